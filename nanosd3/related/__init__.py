"""Related systems: predecessors of Stable Diffusion 3, and other ways to the same end.

Each is built from the core's own modules in one small file, is compared with a reference, and
trains in minutes on a finished main job. Nothing outside this folder imports from it, except
`generate --decoder` and the experiments in claims/.

Modules, each of which imports only from those above it:
    finished_run        a finished run of the main job, to build on
    scoring             scores of samples, beside the main model's
    command             the command line common to all
    sample_command      --sample, for what generate cannot open
    dit                 DiT: a transformer for diffusion, conditioned on time and class in four ways
    backbones           DiT on text, CrossDiT, UViT and MMDiT with three sets of weights
    ddpm                diffusion in a thousand steps: noise, losses, samplers
    published_dit       DiT's checkpoints, and diffusers' folders of them
    train_dit           training a DiT on noise or velocity, and sampling with it
    formulations        DDPM, LDM, EDM and rectified flow as one model in one time
    dit_system          the command: train one on labels, and compare
    paths               Gaussian paths from noise to data: OT, VP, cosine, VE
    solvers             midpoint, RK4 and adaptive Dormand-Prince
    likelihood          exact and estimated log-likelihood along the ODE
    train_paths         the transformer, trained along any path
    consistency         consistency models: from any point of a path directly to its end
    train_consistency   distil a run to one network evaluation an image, or train without a teacher
    editing             zero-shot edits with a consistency model
    consistency_decoder a consistency model in place of the autoencoder's decoder
    train_consistency_decoder   train one on frozen latents
    axial_rope          rotary positions for rows and columns
    neighbourhood       neighbourhood attention, by its definition and in tiles
    hdit                HDiT: an hourglass transformer that draws pixels
    train_hdit          training it on captioned pixels, and sampling with it
    hdit_system         train one on captions, and draw with it
    video               spacetime patches: the MMDiT for videos of any size and length
    moving_digits       clips of digits that move and bounce, with captions
    two_digits          clips of two digits, as in the classic data set
    motion              measures which digit a clip shows, and how it moves
    train_video         training the transformer on videos, and sampling with it
    video_system        train one on clips, or draw with it
    vq                  a VQ autoencoder: images as tokens from a learned codebook
    muse                Muse: a transformer that predicts masked tokens, many at a time
    autoregressive      the same tokens, one after the other
    muse_editing        drawing, repainting and mask-free editing with it
    train_muse          training tokeniser and transformer
    muse_system         train them on a finished run, or draw with them
    edit_command        edit images with it
    super_resolution    Muse's cascade: fine tokens from coarse ones
    train_cascade       training it, and a larger decoder
    cascade_system      train them on a finished Muse, or draw with them
    dpo                 Diffusion-DPO for rectified flow, with weights of low rank
    __main__            python -m nanosd3.related
"""
