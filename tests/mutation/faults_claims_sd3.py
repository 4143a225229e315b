"""Mistakes in the experiments on SD3's claims, as in faults_related_fm.py: in what is measured, and
in the rules that decide."""

MIDDLE_FILE, DATA_SETS_FILE = "claims/sd3_middle.py", "claims/data_sets.py"
NETWORKS_FILE, RANKS_FILE = "claims/sd3_networks.py", "claims/sd3_ranks.py"
FORMULATIONS_RULES = "claims/sd3_formulations.py"
ATTENTION_FILE, NORM_FILE = "claims/sd3_attention.py", "claims/sd3_qk_norm.py"
STRAIGHT_FILE = "claims/sd3_straightness.py"

RECORDS_FILE, PAGE_FILE = "claims/records.py", "claims/page.py"
RUNS_FILE = "claims/runs.py"

FAULTS_CLAIMS_SD3 = [
    (RECORDS_FILE, "if len(conditions.seeds) > 1 else", "if conditions.seeds else", "one decides"),
    (RECORDS_FILE, "sorted(FIELDS - set(record))", 'sorted({"name"} - set(record))', "parts lack"),
    (RUNS_FILE, '"draws": first_draws(source)', '"draws": ""', "what is left out is not seen"),
    (RUNS_FILE, "torch.stack([index, captions])", "index", "other captions are not seen"),
    (RUNS_FILE, "        **also,\n", "", "what else it depends on is forgotten"),
    (PAGE_FILE, "if name in records:", "if name in records or name:", "none has not run"),
    (PAGE_FILE, "if shown_by == name", "if shown_by", "each table again"),
    (PAGE_FILE, "if drawn_by == name", "if drawn_by", "each plot again"),
    (MIDDLE_FILE, "ndtr(torch.logit(ends))", "ndtr(ends)", "shares of a normal t"),
    (MIDDLE_FILE, "by_time[QUARTER:-QUARTER]", "by_time[QUARTER:]", "noise's end in the middle"),
    (
        MIDDLE_FILE,
        "middle > max(data, noise)",
        "middle > min(data, noise)",
        "more than at either end, not at both",
    ),
    (
        MIDDLE_FILE,
        "all(middle < noise for _, middle, noise in found)",
        "any(middle < noise for _, middle, noise in found)",
        "refuted by one seed",
    ),
    (MIDDLE_FILE, "[a - b for a, b", "[b - a for a, b", "what is left to learn, below zero"),
    (DATA_SETS_FILE, "F.avg_pool2d(x, 2)", "F.max_pool2d(x, 2)", "the brightest of four pixels"),
    (
        DATA_SETS_FILE,
        "self.features(doubled(halved(self.source.images.test_images)))",
        "self.features(self.source.images.test_images)",
        "compared with whole digits",
    ),
    (
        DATA_SETS_FILE,
        "(pixels - mean) / std",
        "pixels - mean",
        "pixels of a smaller deviation",
    ),
    (
        DATA_SETS_FILE,
        "return accuracy, distance / inputs.floor",
        "return accuracy, distance",
        "a distance for a ratio",
    ),
    (NETWORKS_FILE, "t, pooled * keep[:, None])", "t, pooled)", "never without text"),
    (
        NETWORKS_FILE,
        "formulation.network_input(z, t), t, pooled",
        "z, t, pooled",
        "trained on z as it is",
    ),
    (
        NETWORKS_FILE,
        "save_weights(model, last_file",
        "save_weights(average, last_file",
        "the average for the last weights",
    ),
    (
        NETWORKS_FILE,
        "velocity, times[0] * inputs.noise[rows], times",
        "velocity, inputs.noise[rows], times",
        "starts with more noise than there is",
    ),
    (
        NETWORKS_FILE,
        "(torch.zeros_like(pooled),), guidance)",
        "(torch.zeros_like(pooled),), 1.0)",
        "no guidance",
    ),
    (
        RANKS_FILE,
        "a[0] >= b[0] and a[1] <= b[1]",
        "a[0] >= b[0] and a[1] >= b[1]",
        "the larger distance is better",
    ),
    (RANKS_FILE, "a[1] <= b[1] and a != b", "a[1] <= b[1]", "beaten by oneself"),
    (
        RANKS_FILE,
        "for j in left)}",
        "for j in range(len(points)))}",
        "fronts that have been taken off still beat",
    ),
    (
        FORMULATIONS_RULES,
        "any(m < -2 * s for m, s in leads))",
        "any(m < s for m, s in leads))",
        "refuted within the spread",
    ),
    (
        FORMULATIONS_RULES,
        "lead(few[WEIGHTED], many[WEIGHTED])",
        "lead(many[WEIGHTED], few[WEIGHTED])",
        "many steps before few",
    ),
    (
        ATTENTION_FILE,
        "q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])",
        "q @ k.transpose(2, 3)",
        "logits eight times too large",
    ),
    (ATTENTION_FILE, "x.abs().max().item()", "x.max().item()", "large and negative is small"),
    (ATTENTION_FILE, "/ math.log(x.shape[-1])\n", "\n", "entropy in nats"),
    (ATTENTION_FILE, 'qk_norm=norm == "with"', "qk_norm=True", "always with the norm"),
    (ATTENTION_FILE, "compute=Compute(precision)", "compute=Compute()", "always in float32"),
    (NORM_FILE, "without >= 2 * with_norm", "without >= with_norm", "twice is once"),
    (NORM_FILE, "gain > spread and more > wobble", "gain > spread", "float32 gains as much"),
    (
        NORM_FILE,
        "[a - b for a, b in zip(losses",
        "[b - a for a, b in zip(losses",
        "losses for gains",
    ),
    (
        STRAIGHT_FILE,
        "for name in OF_UNIT_VARIANCE",
        "for name in FORMULATIONS_COMPARED",
        "EDM's scale decides",
    ),
    (STRAIGHT_FILE, "lambda t: 1 / (1 - t)", "lambda t: 1 / t", "EDM's scale from the wrong end"),
    (STRAIGHT_FILE, "z = steps(1)[0] * noise", "z = noise", "starts with all noise"),
    (
        STRAIGHT_FILE,
        "EULER_STEPS.index(5), EULER_STEPS.index(10)",
        "EULER_STEPS.index(5), EULER_STEPS.index(5)",
        "ten steps decide nothing",
    ),
]
