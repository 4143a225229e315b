"""Mistakes in the experiments on channels, as in faults_related_fm.py."""

LATENTS, CHANNELS_FILE = "claims/sd3_latents.py", "claims/sd3_channels.py"

FAULTS_CHANNELS = [
    (LATENTS, "vae = replace(NARROW, latent_channels=channels)",
     "vae = replace(NARROW, latent_channels=4)", "always the same latents"),
    (LATENTS, "    mmdit = replace(finished.config.mmdit, latent_channels=channels,",
     "    mmdit = replace(finished.config.mmdit, latent_channels=4,",
     "a transformer of 4 channels"),
    (LATENTS, '"vae": vae}', '"vae": finished.pipeline.vae}', "the main job's latents"),
    (LATENTS, "config = replace(config, vae=vae.config)", "config = replace(config)",
     "latents as they are, not normalised"),
    (LATENTS, "return vae.decode(vae.denormalise(x0))", "return vae.decode(x0)",
     "decoded as they are, not denormalised"),
    (LATENTS, "mmdit=replace(job.config.mmdit, depth=depth)", "mmdit=replace(job.config.mmdit)",
     "one depth"),
    (LATENTS, "images.first(IMAGES_USED,", "images.first(10 * IMAGES_USED,",
     "ten times the images"),
    (CHANNELS_FILE, 'lead(a["psnr"], b["psnr"])', 'lead(b["psnr"], a["psnr"])', "less is better"),
    (CHANNELS_FILE, "all(mean > spread for", "any(mean > spread for", "one step is enough"),
    (CHANNELS_FILE, "any(mean < -spread for", "any(mean < spread for", "refuted within the spread"),
    (CHANNELS_FILE, "math.log(a / b)", "math.log(b / a)", "a gain is a loss"),
    (CHANNELS_FILE, " and small <= small_spread,", ",", "the shallower may gain, too"),
    (CHANNELS_FILE, "large > large_spread and more", "more", "the deeper need not gain"),
    (CHANNELS_FILE, "more, spread = lead(shallow, deep)", "more, spread = lead(deep, shallow)",
     "the shallower gains more"),
    (CHANNELS_FILE, "large < -large_spread or", "", "the deeper may lose"),
    (CHANNELS_FILE, "network = transformer_in(conditions, finished, latents, depth)",
     "network = transformer_in(conditions, finished, latents, DEEP)", "one depth measured twice"),
    (CHANNELS_FILE, "[name, 64 * int(name),", "[name, 16 * int(name),", "4x4 latents"),
]  # fmt: skip
