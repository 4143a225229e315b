"""What students hear: classic mistakes written as students write them, sizes that do not fit,
loops over elements, and settings of the caller that do not matter."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanosd3.exercises import EXERCISES, check, show, task_of
from nanosd3.exercises.grader.checker import judge
from nanosd3.random_streams import rng

MUTANTS = {(e.name, m.name): m for e in EXERCISES.values() for m in e.mutants}
LOOPED = [e for e in EXERCISES.values() if not e.formulas]


def message(name, answer):
    verdict = judge(EXERCISES[name], answer)
    assert verdict.points == 0, verdict.message
    return verdict.message


# --- settings of the caller ----------------------------------------------------------------------


def test_gradients_may_be_off_around_the_check():
    with torch.no_grad():
        for exercise in EXERCISES.values():
            if exercise.differentiable:
                assert judge(exercise, exercise.reference).status == "right", exercise.name
        assert not torch.is_grad_enabled()


SOME = [EXERCISES[name] for name in ("interpolate", "timestep_embedding", "attention", "schedule")]


@pytest.mark.parametrize("setting", [
    torch.inference_mode,
    lambda: torch.device("meta"),
    lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    lambda: torch.autograd.set_detect_anomaly(True),
])  # fmt: skip
def test_other_settings_do_not_matter(setting):
    with setting():
        assert {judge(exercise, exercise.reference).status for exercise in SOME} == {"right"}


def test_the_default_dtype_does_not_matter_and_is_restored():
    torch.set_default_dtype(torch.float64)
    try:
        assert all(judge(e, e.reference).points for e in SOME)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_numbers_of_the_notebook_go_on():
    """Neither what a reference draws for its weights nor an answer that seeds gets there."""

    def seeds(*_: object) -> None:
        torch.manual_seed(1)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    for exercise, answer in (EXERCISES["resblock"], None), (SOME[0], seeds):
        judge(exercise, answer or exercise.reference)
        assert torch.equal(torch.get_rng_state(), before)


# --- how it is printed ---------------------------------------------------------------------------


def test_lines_fit_a_notebook(capsys):
    """JupyterLab breaks long ones inside words; the lines of a docstring are aligned."""
    for exercise in EXERCISES.values():
        check(exercise.name, exercise.reference)
        check(exercise.name, lambda *_: None)
        assert max(map(len, capsys.readouterr().out.split("\n"))) <= 90, exercise.name
    show("guide")
    assert "guide: 2 points, difficulty * of ***\n" in (shown := capsys.readouterr().out)
    assert "\n    prompt, both of one shape." in shown
    show("mode")
    assert capsys.readouterr().out.startswith("mode: 1 point, ")


# --- loops over elements -------------------------------------------------------------------------


@pytest.mark.parametrize("exercise", LOOPED, ids=lambda e: e.name)
def test_a_pasted_specification_is_too_slow(exercise):
    text = message(exercise.name, exercise.specification)
    assert text.startswith("speed: the values are right, but for ") and text.endswith(
        f"lines of Python are run. {exercise.slow_hint}"
    )


def test_where_a_loop_is_the_answer_there_is_nothing_to_paste():
    formulas = [e for e in EXERCISES.values() if e.formulas]
    assert {e.name for e in formulas if e.topic == "solvers"} == {
        "euler",
        "heun",
        "dpmpp_2m",
        "rk4",
    }
    assert len(formulas) + len(LOOPED) == len(EXERCISES)
    for exercise in formulas:
        assert inspect.getsource(exercise.specification) not in task_of(exercise)
        assert task_of(exercise).endswith(f"words and formulas:\n{exercise.formulas}")
        with pytest.raises(SyntaxError):
            compile(exercise.formulas, "pasted", "exec")


def test_other_loops_are_answers():
    """Over heads, parts, microbatches, encoders, words: what does not grow with the size."""

    def attention(q, k, v):
        out = []
        for h in range(q.shape[1]):
            logits = q[:, h] @ k[:, h].transpose(1, 2)
            weights = (logits / math.sqrt(64)).softmax(-1)
            out.append(weights @ v[:, h])
        return torch.cat(out, dim=-1)

    def split_heads(x, parts):
        B, L, features = x.shape
        out = []
        for p in range(parts):
            part = x[:, :, p * features // parts : (p + 1) * features // parts]
            out.append(part.reshape(B, L, -1, 64).transpose(1, 2))
        return out

    def accumulate_gradient(weight, x0, noise, t, size):
        total = torch.zeros_like(weight)
        for i in range(0, len(x0), size):
            a, n, s = x0[i : i + size], noise[i : i + size], t[i : i + size, None]
            z = (1 - s) * a + s * n
            total += 2 * z.T @ (z @ weight - (n - a)) / z.shape[1]
        return total / len(x0)

    def best_split(word, scores):
        best, start = [0.0] + [-math.inf] * len(word), [0] * (len(word) + 1)
        for end in range(1, len(word) + 1):
            for begin in range(end):
                piece = word[begin:end]
                if piece in scores:
                    total = best[begin] + scores[piece]
                    if total > best[end]:
                        best[end] = total
                        start[end] = begin
        pieces, end = [], len(word)
        while end > 0:
            pieces.insert(0, word[start[end] : end])
            end = start[end]
        return pieces

    def train_bpe(counts, merges):
        words = [[*list(word[:-1]), word[-1] + "</w>"] for word in counts]
        learned = []
        while len(learned) < merges:
            pairs = {}
            for word, count in zip(words, counts.values(), strict=True):
                for i in range(len(word) - 1):
                    key = (word[i], word[i + 1])
                    if key not in pairs:
                        pairs[key] = 0
                    pairs[key] += count
            if len(pairs) == 0:
                break
            best = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[0][0]
            learned.append(best)
            for word in words:
                i = 0
                while i < len(word) - 1:
                    if (word[i], word[i + 1]) == best:
                        word[i : i + 2] = [word[i] + word[i + 1]]
                    i += 1
        return learned

    def bucket_sizes(side, multiple, most, ratio):
        sizes = []
        for short in range(multiple, side + 1, multiple):
            exact = side * side / short
            below = math.floor(exact / multiple) * multiple
            above = below + multiple
            long = below if exact - below <= above - exact else above
            if long > most or long > ratio * short:
                continue
            sizes.append((short, long))
            if long != short:
                sizes.append((long, short))
        sizes.sort(key=lambda size: size[0] / size[1])
        return sizes

    for answer in list(locals().values()):
        verdict = judge(EXERCISES[answer.__name__], answer)
        assert verdict.status == "right", verdict.message


def test_the_network_is_not_called_in_vain():
    def euler(velocity, z, ts):
        for i in range(len(ts) - 1):
            z = z + (ts[i + 1] - ts[i]) * (velocity(z, ts[i]) + velocity(z, ts[i])) / 2
        return z

    assert "velocity is called 10 times instead of 5" in message("euler", euler)


# --- classic mistakes ----------------------------------------------------------------------------

NAMED = """
patchify split_by_view rest_cut_off / unpatchify unpatchify_transposed / sincos_positions
quarter_minus_one base_1000 / rms_norm over_all_axes weight_forgotten
rms_norm_as_it_comes / attention
divided_by_root_of_width / qk_norm_attention values_for_keys values_normed_too normed_after_softmax
one_weight_for_both / gated_mlp gate_before_mlp bias_not_gated shift_and_scale_exchanged /
timestep_embedding half_precision bfloat16_precision angles_in_half_precision / mode
mode_of_one_minus_u / cosmap cosmap_without_pi / interpolate first_time_for_all mean_time_for_all
root_weights noise_twice / shift shift_of_one_minus_t / schedule ends_at_smallest ends_above_zero /
heun positions_averaged second_slope_at_t_i / dpmpp_2m history_from_zero history_from_noise /
sample_posterior mean_only / denormalise denormalised_twice / train_bpe leftmost_first / pool_at_end
over_features / contrastive_loss scale_times_loss / drop_encoders one_coin_for_all
survivors_rescaled rescaled_by_rate / frechet_distance root_of_trace / image_to_image noised_twice /
best_split by_products / merge_pair as_a_list
"""  # mistakes that once got no sentence, or their points


def test_the_list_of_classic_mistakes():
    """All of them are mutants, whose hints test_exercises.py checks."""
    for row in NAMED.split("/"):
        name, *mistakes = row.split()
        assert all((name, mistake) in MUTANTS for mistake in mistakes), row
    assert len(MUTANTS) >= 300


def imaginary_parts_added(a, b):
    a, b = a.double(), b.double()
    A, B = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(A @ B).sqrt()
    difference = (a.mean(0) - b.mean(0)).square().sum()
    return (difference + A.trace() + B.trace() - 2 * (roots.real + roots.imag).sum()).item()


def test_imaginary_parts_of_a_frechet_distance_are_rounding():
    """Adding them is no mistake that any input could show: the eigenvalues of A B are those of the
    symmetric A^(1/2) B A^(1/2), so real and at least 0. Where they are 0 (fewer samples than
    features), rounding makes some of them negative and some positive, and their roots, 1e-8 of the
    trace, are as wrong with the imaginary parts as without."""
    exercise = EXERCISES["frechet_distance"]
    assert judge(exercise, imaginary_parts_added).status == "right"
    for features in (8, 64, 200):
        a, b = torch.randn(2, 5, features, generator=rng("imaginary", features))
        for other in (a.flip(0), b, b * torch.logspace(0, -6, features)):
            of_answer, of_specification = (
                abs(f(a, other) - exercise.reference(a, other))
                for f in (imaginary_parts_added, exercise.specification)
            )
            scale = (a.var(0) + other.var(0)).sum()
            assert of_answer < 1e-6 * scale and of_specification < 1e-6 * scale


def unfolded(x, patch):
    return F.unfold(x, patch, stride=patch).transpose(1, 2)


def with_rearranged_view(x, patch):
    B, C, H, W = x.shape
    x = x.permute(0, 2, 3, 1).contiguous().view(B, H // patch, W // patch, patch, patch, C)
    return x.flatten(3).flatten(1, 2)


def divided_twice(x, weight):
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True) * weight


def scaled_by_model_width(q, k, v):
    width = q.shape[1] * q.shape[3]
    out = F.scaled_dot_product_attention(q, k, v, scale=width**-0.5)
    return out.transpose(1, 2).flatten(2)


def of_noise_prediction(velocity, x0, noise):
    return F.mse_loss(velocity, noise, reduction="none").flatten(1).mean(1)


def kernel_of_two(u, mean, std):
    return 1 / (1 + torch.exp(-(mean + std * u)))


def not_halved(mean, logvar):
    return (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1)


def greedy(word, scores):
    pieces = []
    while word:
        n = max(n for n in range(1, len(word) + 1) if word[:n] in scores)
        pieces.append(word[:n])
        word = word[n:]
    return pieces


def nan_for_zeros(x, weight):
    return F.normalize(x, dim=-1, eps=0) * weight * weight.numel() ** 0.5


def padding_state(states, ids, end):
    return states[:, ids.shape[1] - 1]


def multiplied_once(context, pooled, keep, dl, length):
    keep = keep.to(context.dtype) / 0.536
    parts = EXERCISES["drop_encoders"].reference(context, pooled, keep > 0, dl, length)
    return tuple(part / 0.536 for part in parts)


def layer_norm_as_it_comes(x, weight):
    return torch.nn.functional.layer_norm(x, weight.shape, weight)


def normalised_by_torch(x, weight):
    return torch.nn.functional.normalize(x, dim=-1) * weight


@pytest.mark.parametrize(("name", "answer", "sentence"), [
    ("rms_norm", layer_norm_as_it_comes, "that would be LayerNorm"),
    ("rms_norm", normalised_by_torch, "The mean of the squares, not their sum"),
    ("patchify", unfolded, "Within a token the channel should vary fastest."),
    ("patchify", with_rearranged_view, "A view takes whole rows of the image"),
    ("rms_norm", divided_twice, "The mean of the squares, not their sum"),
    ("rms_norm", nan_for_zeros, "a vector of zeros gives 0 / 0"),
    ("attention", scaled_by_model_width, "the root of the width of one head"),
    ("flow_loss", of_noise_prediction, "The target is noise - x0"),
    ("logit_normal", kernel_of_two, "ndtri turns it into a normal variable"),
    ("kl_divergence", not_halved, "Each latent contributes half of the bracket."),
    ("best_split", greedy, "The longest piece is not always"),
    ("pool_at_end", padding_state, "The last position is padding"),
    ("drop_encoders", multiplied_once, "All values are 1.866 times those expected."),
], ids=lambda x: getattr(x, "__name__", ""))  # fmt: skip
def test_mistakes_written_otherwise(name, answer, sentence):
    assert sentence in message(name, answer)


# --- sizes, kinds, and what no mutant says -------------------------------------------------------


def test_swapped_ends_with_one_trailing_axis():
    def swapped(x0, noise, t):
        t = t[:, None]
        return t * x0 + (1 - t) * noise

    text = message("interpolate", swapped)
    assert "raised RuntimeError in line" in text and "give t trailing axes" in text


@pytest.mark.parametrize(("name", "answer", "sentence"), [
    ("modulate", lambda x, shift, scale: x * (1 + scale) + shift, "an axis for the tokens"),
    ("rms_norm", lambda x, w: x / x.square().mean(-1).sqrt() * w, "keepdim=True"),
    ("timestep_embedding", lambda t: t * torch.arange(128.0), "t[:, None]"),
    ("accumulate_gradient", lambda w, x0, noise, t, size: (1 - t) * x0, "t[:, None]"),
    ("repaint", lambda v, mask, x0, noise: mask[0] * v.mT, "aligned at the last axis"),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_size_errors_say_what_to_do(name, answer, sentence):
    text = message(name, answer)
    assert "raised RuntimeError" in text and sentence in text


def test_rest_rows_must_be_refused():
    def cropped(x, patch):
        rows, columns = (size // patch for size in x.shape[2:])
        return EXERCISES["patchify"].reference(x[..., : rows * patch, : columns * patch], patch)

    text = message("patchify", cropped)
    assert "where it should raise an error (input: 5 rows" in text
    assert text.endswith("Rows or columns are lost where patches do not cover the image: "
                         "raise an error.")  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda z: 1.5 * z, "All values are 1.5 times those expected."),
    (lambda z: -z, "All values are -1 times those expected."),
    (lambda z: z + 0.25, "All values are off by 0.25."),
    (lambda z: z.flip(1), "These are the right values, in another order: which axis goes where?"),
    (lambda z: z / 0, "Some values are NaN or infinite: is there a division by 0"),
    (lambda z: torch.where(z == z.flatten()[3], 9.0, z),
     "1 of 120 values differ for images (2, 3, 4, 5); at [0, 0, 0, 3] it is 9, not "),
])  # fmt: skip
def test_what_differs_where_no_mutant_fits(change, sentence):
    reference = EXERCISES["interpolate"].reference
    assert sentence in message("interpolate", lambda *arguments: change(reference(*arguments)))


def test_what_differs_in_results_that_are_no_tensors():
    text = message("bucket_sizes", lambda *_: [(64, 64)])
    assert "For 1024 in steps of 64: list [(64, 64)], expected list [(" in text
    assert "expected tuple" in message("merge_pair", lambda s, p: np.array(s))
    assert "times those expected" in message(
        "learning_rate", lambda *a: 3 * EXERCISES["learning_rate"].reference(*a)
    )
