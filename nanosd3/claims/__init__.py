"""Claims of papers put to the test.

Each experiment declares, before it runs, the claim, what is measured and the rule that decides.

Modules, each of which imports only from those above it:
    experiment          what an experiment is, and the words of a verdict
    runs                the finished main job, and the runs that networks train in
    dit_networks        small DiTs, trained for experiments
    dit_blocks          x-dit-1: the four kinds of block, and gates that do not start at zero
    dit_compute         x-dit-2: error by multiply-adds
    dit_loss_swap       x-dit-5: DDPM's loss and rectified flow's
    fm_identity         x-fm-0: the loss of Flow Matching
    fm_straightness     x-fm-3: how straight paths are
    data_sets           two data sets of digits for the same small transformer
    fm_networks         networks trained along paths, shared by several experiments
    fm_sampling         x-fm-1, x-fm-2: sampling in few steps, and training speed
    fm_solvers          x-fm-5: off-the-shelf solvers
    fm_likelihood       x-fm-4: likelihoods of points and of pixels
    sd3_middle          x-sd3-middle: where on the path there is most to learn
    sd3_networks        transformers trained by each formulation
    sd3_ranks           sorting by two scores in many settings
    sd3_formulations    x-sd3-formulations, x-sd3-pixels: which is best, and at how many steps
    sd3_straightness    x-sd3-straight: whose paths are straightest, and need fewest steps
    sd3_attention       attention's logits, measured during training
    sd3_qk_norm         x-sd3-qk-norm: what it bounds, and what it is good for
    sd3_one_way         MMDiTs whose streams do not both read each other
    sd3_variants        the main job's transformer, trained briefly in variants
    sd3_scaling         x-sd3-scaling, -predicts, -steps: what size does
    sd3_two_way         x-sd3-two-way: text and image that read each other, or not
    sd3_without_t5      x-sd3-t5: leaving out the largest encoder
    sd3_backbone_networks   backbones, trained briefly with and without the pooled text
    sd3_backbones       x-sd3-backbones, -equal, -third: what MMDiT was chosen over
    sd3_captions        x-sd3-captions, -rich: captions as they came, and better ones
    repeated_digits     digits, some of them repeated nearly unchanged
    copy_detection      near-copies found by features
    sd3_duplicates      x-sd3-duplicates, -found: images that are in the data many times
    sd3_shift           x-sd3-shift: times for larger images
    sd3_guidance        x-sd3-guidance: following the prompt versus diversity
    sd3_preferences     pairs of samples, one right and one wrong, and transformers tuned on them
    sd3_dpo             x-sd3-dpo, -distance: tuning on preferences
    sd3_latents         autoencoders of several channels, and transformers in their latents
    sd3_channels        x-sd3-channels, -size: how many channels latents should have
    consistency_students   students of several seeds, and their samples
    consistency_steps   x-cm-0, x-cm-1: distillation, and whether more steps help
    consistency_progressive   x-cm-5: against progressive distillation
    hdit_detail         x-hd-3: what latents lose of an image
    consistency_pixels  unconditional consistency models of pixels
    edit_tasks          editing tasks, and their scores
    consistency_edits   x-cm-4: repainting, enlarging and cleaning without training for it
    consistency_variants   consistency training with some of its improvements
    consistency_alone   x-cm-2, x-cm-3: without a teacher, and each improvement alone
    hdit_costs          x-hd-1: what a pass costs as images grow
    decoder_networks    two decoders for the latents of one autoencoder
    decoder_quality     x-cdec-1: for strongly compressed latents
    decoder_drop_in     x-cdec-3: on latents that a generator has made
    decoder_price       x-cdec-2: what a generative decoder costs
    hdit_networks       hourglass and flat transformers in pixels, of equal cost
    hdit_quality        x-hd-2: an hourglass against flat ones
    hdit_weighting      x-hd-4: what soft-min-SNR does
    video_clips         x-sora-1, x-sora-4: other sizes and lengths, coherence
    video_networks      transformers on short clips, shared by two experiments
    video_framing       x-sora-2: native frames against square crops
    video_compute       x-sora-3: clips by training compute
    muse_networks       Muses of several seeds, shared by several experiments
    muse_masks          x-muse-1: how much to hide in training
    muse_samplers       three ways to draw the same digits
    muse_speed          x-muse-2: how many steps it needs, against two other ways
    muse_cascade        x-muse-3: coarse tokens before fine ones
    muse_decoders       x-muse-7: a larger decoder for the same tokens
    muse_edits          x-muse-4, x-muse-5: repainting, and editing without a mask
    muse_encoders       Muses with three text encoders
    muse_text           x-muse-6: a text encoder that was trained beforehand
    sd3_card            x-sd3-24gb: the 8B model on one consumer card
    catalogue           all experiments by name
    records             run an experiment, and write its record
    page                README.md, built from the records
    __main__            the command line
"""
