"""All experiments by name. A new one is a file beside this one, and a line here."""

from nanosd3.claims.consistency_alone import ALONE_AT_ALL, EACH_CHANGE, IMPROVED
from nanosd3.claims.consistency_edits import MORE_EDIT_STEPS, ZERO_SHOT
from nanosd3.claims.consistency_progressive import PROGRESSIVE, PROGRESSIVE_STEPS
from nanosd3.claims.consistency_steps import CONSISTENT, DISTILLATION, MORE_STEPS
from nanosd3.claims.decoder_drop_in import DROP_IN
from nanosd3.claims.decoder_price import PRICE
from nanosd3.claims.decoder_quality import BETTER_DECODING, SECOND_STEP
from nanosd3.claims.dit_blocks import DIT_BLOCKS, GATES
from nanosd3.claims.dit_compute import DIT_COMPUTE
from nanosd3.claims.dit_loss_swap import LOSS_SWAP
from nanosd3.claims.experiment import Experiment
from nanosd3.claims.fm_identity import IDENTITY
from nanosd3.claims.fm_likelihood import LIKELIHOOD
from nanosd3.claims.fm_sampling import FEW_STEPS, TRAINING_SPEED
from nanosd3.claims.fm_solvers import ADAPTIVE, ORDER
from nanosd3.claims.fm_straightness import STEPS, STRAIGHTNESS
from nanosd3.claims.hdit_costs import COSTS
from nanosd3.claims.hdit_detail import DETAIL
from nanosd3.claims.hdit_quality import SHAPE
from nanosd3.claims.hdit_weighting import WEIGHTING
from nanosd3.claims.muse_cascade import CASCADE
from nanosd3.claims.muse_decoders import LARGER_DECODERS
from nanosd3.claims.muse_edits import FREE_EDITING, REPAINTING
from nanosd3.claims.muse_masks import MASKS
from nanosd3.claims.muse_speed import FASTER_THAN_CAUSAL, FASTER_THAN_FLOW, FEW_ENOUGH
from nanosd3.claims.muse_text import TRAINED_ENCODER, UNSEEN_WORDS
from nanosd3.claims.sd3_backbones import AS_LARGE_AS_MMDIT, BACKBONE_RANKING, THIRD_WEIGHTS
from nanosd3.claims.sd3_captions import CAPTIONS, NOT_RICH_ALONE
from nanosd3.claims.sd3_card import CARD
from nanosd3.claims.sd3_channels import CHANNELS_BY_SIZE, RECONSTRUCTION
from nanosd3.claims.sd3_dpo import DPO_DISTANCE, DPO_WINS
from nanosd3.claims.sd3_duplicates import DUPLICATES, FOUND
from nanosd3.claims.sd3_formulations import (
    BEST,
    BEST_OF_PIXELS,
    FEW_OR_MANY,
    FEW_OR_MANY_OF_PIXELS,
)
from nanosd3.claims.sd3_guidance import GUIDANCE_TRADE
from nanosd3.claims.sd3_middle import MIDDLE
from nanosd3.claims.sd3_qk_norm import LOGITS, STABILITY
from nanosd3.claims.sd3_scaling import FEWER_STEPS, PREDICTS, SMOOTH
from nanosd3.claims.sd3_shift import TIMES_SHIFT
from nanosd3.claims.sd3_straightness import FEWEST, STRAIGHTEST
from nanosd3.claims.sd3_two_way import CUT, TWO_WAY
from nanosd3.claims.sd3_without_t5 import WITH_DROPOUT, WITHOUT_T5
from nanosd3.claims.video_clips import COHERENCE, LENGTHS, OTHER_SIZES_KEPT
from nanosd3.claims.video_compute import CLIP_COMPUTE
from nanosd3.claims.video_framing import FRAMING

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        *(MIDDLE, BEST, FEW_OR_MANY, BEST_OF_PIXELS, FEW_OR_MANY_OF_PIXELS),  # Stable Diffusion 3
        *(BACKBONE_RANKING, AS_LARGE_AS_MMDIT, THIRD_WEIGHTS),
        *(STRAIGHTEST, FEWEST, TWO_WAY, CUT, SMOOTH, PREDICTS, FEWER_STEPS),
        *(LOGITS, STABILITY, WITHOUT_T5, WITH_DROPOUT, TIMES_SHIFT, GUIDANCE_TRADE, CARD),
        *(CAPTIONS, NOT_RICH_ALONE, DUPLICATES, FOUND),
        *(RECONSTRUCTION, CHANNELS_BY_SIZE, DPO_WINS, DPO_DISTANCE),
        *(DIT_BLOCKS, GATES, DIT_COMPUTE, LOSS_SWAP),  # DiT
        *(IDENTITY, FEW_STEPS, TRAINING_SPEED, STRAIGHTNESS, STEPS),  # Flow Matching
        *(LIKELIHOOD, ADAPTIVE, ORDER),
        *(CONSISTENT, DISTILLATION, MORE_STEPS, ALONE_AT_ALL),  # Consistency Models
        *(IMPROVED, EACH_CHANGE, ZERO_SHOT, MORE_EDIT_STEPS, PROGRESSIVE, PROGRESSIVE_STEPS),
        *(BETTER_DECODING, SECOND_STEP, PRICE, DROP_IN),  # the Consistency Decoder
        *(COSTS, SHAPE, DETAIL, WEIGHTING),  # HDiT
        *(OTHER_SIZES_KEPT, LENGTHS, FRAMING, CLIP_COMPUTE, COHERENCE),  # spacetime patches
        *(MASKS, FEW_ENOUGH, FASTER_THAN_FLOW, FASTER_THAN_CAUSAL),  # Muse
        *(CASCADE, REPAINTING, FREE_EDITING, TRAINED_ENCODER, UNSEEN_WORDS, LARGER_DECODERS),
    )
}
