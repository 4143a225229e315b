"""Neighbours: systems that Stable Diffusion 3 grew from, or that grew beside it.

Each stands on the core's own pieces in one small file, is held against a reference, and trains
here in minutes, in the latents of a finished main job. Nothing outside this folder imports from it,
except `generate --decoder` and the experiments in claims/.

Modules, each of which imports only from those above it:
    finished_run        a finished run of the main job, to build on
    yardsticks          how a neighbour compares with the main model
    command             the command line that all have in common
    sample_command      --sample, for what generate cannot open
    dit                 DiT: a transformer for diffusion, and four ways to tell it time and class
    backbones           DiT on text, CrossDiT, UViT and MMDiT with three sets of weights
    ddpm                diffusion in a thousand steps: noise, losses, samplers
    published_dit       DiT's checkpoints, and diffusers' folders of them
    dit_lessons         teaching a DiT the noise or the velocity, and sampling with it
    formulations        DDPM, LDM, EDM and rectified flow as one model in one time
    train_dit           train one on labels, and see how it compares
    paths               Gaussian paths from noise to data: OT, VP, cosine, VE
    solvers             midpoint, RK4 and adaptive Dormand-Prince
    likelihood          exact and estimated log-likelihood along the ODE
    train_paths         the transformer, trained along any path
    consistency         consistency models: from anywhere on a path straight to its end
    train_consistency   distil a run to one network evaluation an image, or train without a teacher
    editing             zero-shot edits with a consistency model
    consistency_decoder a consistency model in place of the autoencoder's decoder
    train_consistency_decoder   train one on frozen latents
    axial_rope          rotary positions for rows and columns
    neighbourhood       neighbourhood attention, by its definition and in tiles
    hdit                HDiT: an hourglass transformer that draws pixels
    hdit_lessons        teaching it pixels with captions, and sampling with it
    train_hdit          train one on captions, and draw with it
    video               spacetime patches: the MMDiT for videos of any size and length
    moving_digits       clips of digits that move and bounce, with captions
    two_digits          clips of two digits, as in the classic data set
    motion              what is in a clip: which digit, and how it moves
    video_lessons       teaching the transformer videos, and sampling with it
    train_video         train one on clips, or draw with it
    vq                  a VQ autoencoder: images as tokens from a learned alphabet
    muse                Muse: a transformer that guesses hidden tokens, many at a time
    autoregressive      the same tokens, one after the other
    muse_editing        drawing, repainting and mask-free editing with it
    muse_lessons        teaching tokens and transformer
    train_muse          train them on a finished run, or draw with them
    edit_command        edit images with it
    super_resolution    Muse's cascade: fine tokens from coarse ones
    cascade_lessons     teaching it, and a larger decoder
    train_cascade       train them on a finished Muse, or draw with them
    dpo                 Diffusion-DPO for rectified flow, with weights of low rank
    __main__            python -m nanosd3.related
"""
