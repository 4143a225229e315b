"""Mistakes in the experiments on consistency models and their decoder, as in
faults_claims_sd3.py."""

PIXELS, TASKS, EDITS = (
    f"claims/{name}.py" for name in ("consistency_pixels", "edit_tasks", "consistency_edits")
)
PRICE_FILE, TWO_FILE, QUALITY = (
    f"claims/decoder_{name}.py" for name in ("price", "networks", "quality")
)
DROPPED_IN = "claims/decoder_drop_in.py"
HALVING = "claims/consistency_progressive.py"
SWITCHES, ALONE_FILE = "claims/consistency_variants.py", "claims/consistency_alone.py"

FAULTS_CLAIMS_CONSISTENCY = [
    # consistency_progressive.py
    (
        HALVING,
        "per_image(s - middle, z) * velocity(half, middle)",
        "per_image(s - middle, z) * velocity(z, t)",
        "the second step repeats the first",
    ),
    (HALVING, "slope = (z - end)", "slope = (half - end)", "the second step alone"),
    (HALVING, "torch.maximum((1 - t) ** 2, t**2)", "(1 - t) ** 2", "pure noise does not count"),
    (HALVING, "        student.load_state_dict(weights)\n", "", "students start from nothing"),
    (
        HALVING,
        "student_teacher(student), student.state_dict()",
        "teacher, student.state_dict()",
        "the main model teaches all",
    ),
    (HALVING, "halved[steps] if name", "halved[1] if name", "one student at all steps"),
    (
        HALVING,
        "any(not any(by_seed) for by_seed in wins)",
        "not any(map(any, wins))",
        "refuted only if beaten at both",
    ),
    (HALVING, "enough and all(map(all, wins))", "all(map(all, wins))", "one seed decides"),
    # consistency_pixels.py
    (
        PIXELS,
        "interpolate(x0, noise, t), interpolate(x0, noise, s)",
        "interpolate(x0, noise, s), interpolate(x0, noise, t)",
        "the target is the noisier one",
    ),
    (
        PIXELS,
        "consistency_loss(network, z_t, t, z_s, s,",
        "consistency_loss(network, z_t, t, z_s, t,",
        "the second point at the first one's time",
    ),
    (PIXELS, "*LEVELS_OF_PIXELS) - 1", "*LEVELS_OF_PIXELS)", "a level more"),
    (PIXELS, "z.new_zeros(len(z), 1, 1, 1)", "z[:, :, :1, :1]", "told a pixel"),
    (
        PIXELS,
        "return self.network(z, t, zero",
        "return self.network(z, 0 * t, zero",
        "every time is 0",
    ),
    (PIXELS, "doubling_count(step,", "doubling_count(0,", "the levels stay few"),
    # edit_tasks.py
    (TASKS, "< side // 2)[:, None]", "< side // 2)", "the left half is known"),
    (TASKS, "< side // 2)", ">= side // 2)", "the lower half is known"),
    (TASKS, "(z - image) / t", "z - image", "not as far as the image"),
    (TASKS, "times = even_schedule(steps)", "times = even_schedule(steps + 1)", "a step more"),
    (TASKS, 'rng(seed, "edit noise")', 'rng("edit noise")', "all seeds draw the same"),
    (TASKS, "* self.known).abs().max()", "* self.known).max()", "darker is not off"),
    (TASKS, "* self.known).abs()", ").abs()", "what is unknown is off as well"),
    (TASKS, "distance / scorer.distance(original)", "distance", "not over that of the digits"),
    (TASKS, "decibels(shown, original)", "decibels(shown, shown)", "no error"),
    # consistency_edits.py
    (EDITS, "sigma = NOISE_CLEANED / std", "sigma = NOISE_CLEANED * std", "weaker noise"),
    (EDITS, "t = sigma / (1 + sigma)", "t = sigma", "another time"),
    (EDITS, "(1 - t) * noisy, t)", "noisy, t)", "the model's scale is forgotten"),
    (EDITS, "after[0] >= before[0] and after[1]", "after[1]", "reading does not count"),
    (EDITS, "after[1] < before[1]", "after[1] > before[1]", "farther is better"),
    (EDITS, "pairs.append((edits[", "pairs and ((edits[", "cleaning does not count"),
    (EDITS, "exact and all(by_seed)", "all(by_seed)", "what is known may change"),
    (EDITS, "not any(by_seed))", "not all(by_seed))", "refuted by one seed"),
    (EDITS, "a > b > c > d", "a > b > c", "the last step may be worse"),
    (EDITS, "task[1] > task[3]", "task[0] > task[3]", "than one step, not two"),
    # decoder_price.py
    (PRICE_FILE, "count_flops(way) / 2e6", "count_flops(way) / 1e6", "operations, not pairs"),
    (PRICE_FILE, "(*DECODING_TIMES[:steps], 0.0)", "(*DECODING_TIMES[:1], 0.0)", "always a step"),
    (PRICE_FILE, "own(), other()  # the", "own()  # the", "the first call counts"),
    (PRICE_FILE, "found.append(second / first)", "found.append(first / second)", "the other way"),
    (PRICE_FILE, "statistics.median(found)", "max(found)", "the largest ratio"),
    (PRICE_FILE, "min(ratios) >= 5", "max(ratios) >= 5", "by either measure"),
    (PRICE_FILE, "enough and any(cheap)", "enough and all(cheap)", "cheap for both"),
    (PRICE_FILE, "max(ratios) <= 2", "max(ratios) < 2", "two times is not within two"),
    # decoder_networks.py
    (TWO_FILE, "longer = copy.deepcopy(vae)", "longer = vae", "its own decoder changes too"),
    (
        TWO_FILE,
        "vae.decode(sample_posterior(mean, logvar, noise))",
        "vae.decode(vae.normalise(sample_posterior(mean, logvar, noise)))",
        "normalised latents",
    ),
    (
        TWO_FILE,
        "(rebuilt - x).square().flatten(1).sum(1)",
        "(rebuilt - x).flatten(1).sum(1)",
        "the error is not squared",
    ),
    (TWO_FILE, "flatten(1).sum(1), {}", "flatten(1).mean(1), {}", "a mean over pixels"),
    (
        TWO_FILE,
        "longer.decoder, loss_of, DECODER_EMA)",
        "longer.decoder, loss_of, 1.0)",
        "the average never moves",
    ),
    (
        TWO_FILE,
        'for s in (LONGER, "decoder"))',
        'for s in ("decoder", "decoder"))',
        "the other's seconds",
    ),
    # decoder_quality.py
    (QUALITY, "vae.decode(vae.denormalise(latents))", "vae.decode(latents)", "normalised latents"),
    (
        QUALITY,
        "TRAINED_ON: by_itself(decoders.longer)",
        "TRAINED_ON: by_itself(vae)",
        "its own decoder twice",
    ),
    (
        QUALITY,
        "decoding(decoders.consistency, factor, 1)",
        "decoding(decoders.consistency, factor, 2)",
        "two steps twice",
    ),
    (QUALITY, "ratio < ratios[name][i] and off", "off", "sharpness alone"),
    (QUALITY, "off < abs(edges[name][i] - 1)", "off < edges[name][i]", "sharper than blank"),
    (QUALITY, "others = (OWN, TRAINED_ON)", "others = (TRAINED_ON,)", "its own does not count"),
    (QUALITY, "[a >= b for a, b", "[a > b for a, b", "as far is better"),
    (QUALITY, "lead(two, one)", "lead(one, two)", "the other way"),
    # decoder_drop_in.py
    (
        DROPPED_IN,
        "(BY_ITS_OWN, finished.pipeline), (BY_ANOTHER, other)",
        "(BY_ITS_OWN, other), (BY_ANOTHER, other)",
        "the same decoder twice",
    ),
    (
        DROPPED_IN,
        '"drop-in", seed, vae.config)',
        '"drop-in", 0, vae.config)',
        "one decoder for all seeds",
    ),
    (DROPPED_IN, "ours[1] <= own[1] and", "ours[1] < own[1] and", "as far is worse"),
    (DROPPED_IN, "and ours[0] >= own[0] - 0.01 for", "for", "nothing need be read"),
    (DROPPED_IN, "own[0] - 0.01", "own[0] + 0.01", "better read is asked for"),
    (DROPPED_IN, "enough and all(farther)", "enough and any(farther)", "refuted by one seed"),
    # consistency_variants.py
    (
        SWITCHES,
        "target = None if variant.itself else average",
        "target = None",
        "the network is always its target",
    ),
    (
        SWITCHES,
        "distance = None if variant.huber else",
        "distance = None if not variant.huber else",
        "the distances exchanged",
    ),
    (
        SWITCHES,
        "first, last) - 1 if variant.doubled else last",
        "first, last) if variant.doubled else last",
        "a level more",
    ),
    (
        SWITCHES,
        "times = TOP * even_levels(count)",
        "times = even_levels(count)",
        "levels up to noise alone",
    ),
    (
        SWITCHES,
        "lognormal_weights(times) if variant.lognormal",
        "None if variant.lognormal",
        "all levels as often",
    ),
    (SWITCHES, "losses * gap_weight(t, s)", "losses / gap_weight(t, s)", "far levels count more"),
    (
        SWITCHES,
        "interpolate(x0, noise, t), interpolate(x0, noise, s)",
        "interpolate(x0, noise, t), interpolate(x0, noise, t)",
        "a pair of one point",
    ),
    (
        SWITCHES,
        "y = trainer.labels[images]",
        "y = 0 * trainer.labels[images]",
        "the label is not told",
    ),
    # consistency_alone.py
    (SWITCHES, "noise = times[0] * finished", "noise = finished", "noise too strong"),
    (
        "related/scoring.py",
        "return accuracy, distance / floor",
        "return accuracy, distance",
        "not over that of real images",
    ),
    (
        ALONE_FILE,
        '"levels doubled": ConsistencyVariant(doubled=True)',
        '"levels doubled": ConsistencyVariant(doubled=True, itself=True)',
        "two changes at once",
    ),
    (ALONE_FILE, "read >= 0.5 and ratio", "ratio", "nothing need be read"),
    (ALONE_FILE, "enough and not any(wins)", "enough and not all(wins)", "refuted by one seed"),
    (
        ALONE_FILE,
        "lead(distances_of(results, ALL_CHANGES), distances_of(results, ORIGINAL))",
        "lead(distances_of(results, ORIGINAL), distances_of(results, ALL_CHANGES))",
        "the other way",
    ),
    (ALONE_FILE, "helps = all(mean > spread", "helps = any(mean > spread", "one is enough"),
    (ALONE_FILE, "any(mean < -spread for", "all(mean < -spread for", "all must do harm"),
]
