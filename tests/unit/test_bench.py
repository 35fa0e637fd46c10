"""What benchmarks do with their results: averages, tables, going on after an interruption. No model is run."""

import json
import math
import time

import pytest
import torch

from stem.scenes import edit_scene, render
from tools.bench import bases, clips, edit, em, em_options, inversion, inversion_cost, report, scale
from tools.bench.cost import Cost

ONE, TWO = {"psnr": 30.0, "seconds": 2.0}, {"psnr": 20.0, "seconds": 4.0}


def test_mean_is_taken_over_the_clips_of_each_method():
    found = report.mean({"a": {"stem": ONE, "ddim": TWO}, "b": {"stem": TWO}})
    assert found == {"stem": {"psnr": 25.0, "seconds": 3.0}, "ddim": TWO}


def test_mean_of_nothing_is_nothing():
    assert report.mean({}) == report.mean({"a": {}}) == {}


def test_table_is_markdown_and_leaves_out_what_is_missing():
    columns = {"psnr": ("PSNR", ".1f"), "seconds": ("s", ".0f")}
    assert report.table({"stem": ONE, "vae": {"seconds": 0.4}}, columns, "method").splitlines() == [
        "| method | PSNR | s |",
        "| --- | ---: | ---: |",
        "| stem | 30.0 | 2 |",
        "| vae |  | 0 |",
    ]


def test_report_is_read_back_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "x.json"
    assert report.load(path, {"steps": 5}) == {"settings": {"steps": 5}}
    report.save(path, {"settings": {"steps": 5}, "clips": {"a": {"stem": ONE}}})
    assert report.load(path, {"steps": 5})["clips"] == {"a": {"stem": ONE}}
    assert list(tmp_path.iterdir()) == [path]


def test_report_of_other_settings_is_not_overwritten(tmp_path):
    report.save(tmp_path / "x.json", {"settings": {"steps": 5, "size": 128, "seed": 0}})
    with pytest.raises(report.OtherSettingsError, match=r"another steps, seed, threads\. Delete it"):
        report.load(tmp_path / "x.json", {"steps": 50, "size": 128, "threads": 2})


@pytest.fixture
def bench(monkeypatch):
    """The inversion benchmark with a model that yields still grey clips, and the list of what it was asked to do."""
    asked = []

    class Demo:
        encode = text = staticmethod(lambda x: x)
        decode = staticmethod(lambda x: 0.9 * x)

    def measure(demo, what, source, kept, latents, positive, steps):
        asked.append((source.prompt, what.ways_back, steps))
        if len(asked) == measure.interrupted_at:
            raise KeyboardInterrupt
        return {name: {key: float(len(asked)) for key in inversion.MEASURES} for name in what.ways_back}

    def clip(name):
        return clips.Clip(torch.full((2, 16, 16, 3), 0.5), name, torch.zeros(1, 16, 16, 2), torch.ones(1, 16, 16))

    measure.interrupted_at = None
    monkeypatch.setattr(inversion, "load_demo", Demo)
    monkeypatch.setattr(inversion, "environment", lambda demo: {"checkpoint": "0" * 64})
    monkeypatch.setattr(inversion, "load_clip", clip)
    monkeypatch.setattr(inversion, "measure", measure)
    return asked, measure


def test_all_clips_and_methods_are_measured(bench, tmp_path, capsys):
    asked, _ = bench
    inversion.run(tmp_path / "x.json", quick=False)
    results = json.loads((tmp_path / "x.json").read_text())
    methods = {"stem", "stem_fixed", "stem_plain", "stem_8", "ddim", "first_previous", "all_frames"}
    assert len(asked) == 15 * 5 and {steps for *_, steps in asked} == {50}
    assert len(results["clips"]) == 15 and all(set(found) == methods for found in results["clips"].values())
    assert set(results["methods"]) == methods
    assert set(results["methods"]["stem"]) == set(inversion.MEASURES)
    assert results["settings"]["num_bases"] == 256
    assert results["references"]["bikes.mp4"]["vae"]["psnr_source"] == pytest.approx(-20 * math.log10(0.05), abs=0.01)
    printed = capsys.readouterr().out
    assert all(title in printed for title in ("all clips (15)", "generated clips (12)", "real clips (3)"))
    assert printed.count("\n| first_previous |") == 3
    assert all(f"\n| {clip} |" in printed for clip in results["clips"])


def test_interrupted_run_goes_on_where_it_was(bench, tmp_path):
    asked, measure = bench
    measure.interrupted_at = 7
    with pytest.raises(KeyboardInterrupt):
        inversion.run(tmp_path / "x.json", quick=True)
    before, measure.interrupted_at = asked.copy(), None
    inversion.run(tmp_path / "x.json", quick=True)
    assert before[6] == asked[7]
    done = before[:6] + asked[7:]
    assert len(done) == len(set(done)) == 3 * 5 and {steps for *_, steps in done} == {10}
    asked.clear()
    inversion.run(tmp_path / "x.json", quick=True)
    assert asked == []


def test_cost_is_the_highest_point_of_the_memory_and_the_time():
    with Cost() as cost:
        held = torch.ones(25_000_000)  # 100 MB
        time.sleep(0.05)
        del held
    assert 0.05 <= cost.seconds < 5
    assert 80 < cost.peak_mb < 200


def test_one_basis_for_all_loses_all_variance_and_one_for_each_none():
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    for z, expected in ((torch.eye(6), 0.0), (torch.ones(6, 1), 1.0)):
        z = z.expand(2, *z.shape)
        assert bases.lost(x, z, z.sum(1)) == pytest.approx(expected, abs=1e-3)


def test_look_at_tokens_that_all_bases_share_alike():
    """Equal tokens: every basis starts at them, and each has the same part of every token."""
    keys = torch.full((2, 512, 4), 0.5)
    found = bases.look(keys, keys, seed=0)
    assert found["entropy"] == pytest.approx(math.log(256), rel=1e-4)
    assert found["certainty"] == pytest.approx(1 / 256, rel=1e-3)
    assert found["dead"] == 0 and found["tokens"] == 512
    assert found["key_norm"] == pytest.approx(1) and found["sharpness"] == pytest.approx(100)


def test_bases_that_no_token_chooses_are_dead():
    """Two opposite directions that the initial bases, spread around the mean, fall to by their sign."""
    keys = torch.tensor([3.0, -3.0]).repeat(64)[None, :, None] * torch.ones(1, 1, 4)
    found = bases.look(keys, keys, seed=0)
    assert found["certainty"] > 0.5 and found["dead"] > 200
    assert found["lost_keys"] < 1e-3


def test_tokens_are_caught_at_the_chosen_levels_only():
    class Call:
        block, heads, sigma, frames = "input_1", 2, 1.0, [0, 1]

    class Choice:
        seed = staticmethod(lambda call, start: 7)
        __call__ = staticmethod(lambda k, v, call: iter(["context"]))

    caught = bases.CaughtTokens(Choice(), torch.tensor([0.5, 2.0]))
    k = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    assert list(caught(k, -k, Call)) == ["context"] and not caught.found
    Call.sigma = 2.00001
    assert list(caught(k, -k, Call)) == ["context"]
    ((key, (tokens, seed, keys, values)),) = caught.found.items()
    assert key == (1, "input_1") and tokens == 3 and seed == 7
    assert keys.shape == (2, 6, 2) and torch.equal(values, -keys)


# ------------------------------------------------------------------------------------------------------- edits


def test_pairs_change_one_thing_each_and_all_in_turn():
    pairs = [edit.pair(number) for number in range(edit.PAIRS)]
    for change, source, target in pairs:
        now = {name: getattr(target.figures[0], name) for name in ("colour", "shape")} | {"background": target.background}
        assert target == edit_scene(source, **{change: now[change]}) != source
    assert [sum(asked.change == change for asked in pairs) for change in edit.CHANGES] == [8, 8, 8]
    assert len(set(pairs)) == len(pairs) >= 24


@pytest.mark.parametrize("number", range(3))
def test_the_truth_is_the_best_edit_and_the_source_none(number):
    asked = edit.pair(number)
    truth, source = (edit.compare(asked, render(scene).images) for scene in (asked.target, asked.source))
    assert truth["success"] == truth["kept"] == truth["ssim"] == 1 and truth["psnr"] == math.inf
    assert source["success"] == 0 and source["kept"] == 1 and source["psnr_outside"] == math.inf
    assert truth["psnr_outside"] == math.inf and source["psnr"] < 30 and truth["flicker"] < 0.02


def test_averages_are_over_the_pairs_that_are_done():
    names = [*edit.REFERENCES, *(f"{method}, {editor}" for method, editors in edit.RUNS.items() for editor in editors)]
    row = dict.fromkeys(edit.MEASURES, 0.5)
    results = {"edits": {"pair 0": dict.fromkeys(names, row), "pair 1": dict.fromkeys(names[:-1], row)}}
    edit.summarise(results)
    assert results["pairs"] == 1 and set(results["references"]) == set(edit.REFERENCES)
    for method, editors in edit.RUNS.items():
        for editor in editors:
            against = [other for other in edit.RIVALS if editor in edit.RUNS[other] and other != method]
            counted = {f"{measure}_{other}": 0 for other in against for measure in ("psnr_over", "flicker_under")}
            assert results["results"][method][editor] == {**row, "success_colour": 0.5, **counted}


def test_pairs_are_counted_one_by_one():
    def row(success, psnr, flicker):
        return {"success": success, "psnr": psnr, "flicker": flicker}

    own = [row(0.0, 18.0, 0.01)] * 4

    ddim = [row(1.0, 20.0, 0.02), row(0.0, 20.0, 0.02), row(1.0, 20.0, 0.02), row(0.0, 20.0, 0.02)]
    stem = [row(1.0, 21.0, 0.03), row(0.0, 21.0, 0.01), row(0.0, 20.0, 0.02), row(0.0, 19.0, 0.01)]
    edits = {f"pair {n}": {"ddim, plain": a, "stem, plain": b} for n, (a, b) in enumerate(zip(ddim, stem, strict=True))}
    seen = {"success_colour": 0.5, "success_shape": 0.0, "success_background": 0.0}
    assert edit.count(edits, "stem", "plain") == {**seen, "psnr_over_ddim": 2, "flicker_under_ddim": 2}
    edits = {
        f"pair {n}": {f"{name}, fatezero": rows[n] for name, rows in (("ddim", ddim), ("stem", stem), ("middle_frame", own))}
        for n in range(4)
    }
    assert edit.count(edits, "stem", "fatezero") == {
        **seen, "psnr_over_ddim": 2, "flicker_under_ddim": 2, "psnr_over_middle_frame": 4, "flicker_under_middle_frame": 0
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ speed

EM_KEYS = [
    *("frames", "tokens", "heads", "dim", "dtype", "dense_s", "auto_s"),
    *("speedup", "dense_mb", "auto_mb", "gemm_fraction"),
]


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(em, "LEAST", 0.0)
    monkeypatch.setattr(em, "PRODUCT_ROWS", (8, 16))
    monkeypatch.setattr(em, "BASES", 4)


@pytest.mark.parametrize("dtype", em.DTYPES)
def test_a_case_of_em_is_measured(short, dtype):
    done, forms = em.measure(em.Case(frames=2, tokens=9, heads=3, dim=5, dtype=dtype))
    assert list(done) == EM_KEYS and done["heads"] == 3 and done["dtype"] == dtype
    assert set(forms) == {"dense", "blockwise", "fused", "auto"} and min(forms.values()) > 0
    assert done["speedup"] == forms["dense"] / forms["auto"] and done["gemm_fraction"] > 0


def test_all_cases_of_em_are_measured_once(monkeypatch, tmp_path, capsys):
    asked = []

    def measure(case):
        asked.append(case)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return {**case._asdict(), **dict.fromkeys(em.MEASURES, 1.0)}, dict.fromkeys(em.FORMS, 2.0)

    monkeypatch.setattr(em, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        em.run(tmp_path / "x.json", quick=False)
    em.run(tmp_path / "x.json", quick=False)
    assert asked[4] == asked[5] and len(asked) == 16 + 1
    results = json.loads((tmp_path / "x.json").read_text())
    assert [list(case) for case in results["cases"]] == [EM_KEYS] * 16 and len(results["forms"]) == 16
    sizes = {(case["tokens"], case["dim"]) for case in results["cases"]}
    assert sizes == {(4096, 40), (1024, 80), (256, 160), (64, 160)}
    assert {(case["frames"], case["dtype"]) for case in results["cases"]} == {
        (frames, dtype) for frames in (8, 50) for dtype in ("float32", "bfloat16")
    }
    assert capsys.readouterr().out.count("bfloat16") == 8


def test_operations_of_em_are_those_of_the_paper():
    """22 n K C for five iterations, of which the attention over the bases (4 n K C) is no part."""
    assert em.operations(em.Case(8, 4096, 8, 40, "float32")) == 22 * 8 * 4096 * 256 * 320


def test_random_tokens_lie_as_a_model_gives_them():
    keys, values = em.random_tokens(em.Case(3, 100, 2, 40, "float32"))
    assert keys.shape == values.shape == (2, 300, 40) and keys.stride() == (40, 80, 1)
    assert keys.norm(dim=-1).mean() == pytest.approx(em.KEY_NORM, rel=0.05)


def test_time_of_self_attention_is_that_between_its_projections():
    class Attention(torch.nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.to_v, self.to_out, self.seconds = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), seconds

        def forward(self, x):
            v = self.to_v(x)
            time.sleep(self.seconds)
            return self.to_out(v)

    block = torch.nn.ModuleDict({"attn1": Attention(0.05), "attn2": Attention(0.2)})
    unet = torch.nn.ModuleDict({"a": block})
    with inversion_cost.SelfAttentionTime(unet) as found:
        for name in ("attn1", "attn2", "attn1"):
            block[name](torch.zeros(1, 2))
    before = found.seconds
    assert 0.1 <= before < 0.3
    block["attn1"](torch.zeros(1, 2))
    assert found.seconds == before


def test_costs_are_medians_of_the_rounds_and_compared_with_ddim():
    row = lambda seconds: {"seconds": seconds, "attn1_seconds": 0.5, "peak_mb": 10.0}  # noqa: E731
    results = {"rounds": {"methods": {"ddim": [row(1.0), row(4.0), row(2.0)], "stem": [row(1.0)], "all_frames": []}}}
    inversion_cost.summarise(results)
    assert results["methods"] == {"ddim": row(2.0), "stem": row(1.0)}
    beside = inversion_cost.beside_ddim(results["methods"])["stem"]
    assert beside["of_ddim"] == 0.5 and beside["attn1_of_ddim"] == beside["peak_of_ddim"] == 1


@pytest.mark.parametrize(
    "bench, keys, count",
    [(inversion_cost, ("methods", "default_attention"), 2 * 5 * 3), (scale, ("cases",), 2 * 6 * 3)],
)
def test_interrupted_rounds_go_on_where_they_were(bench, keys, count, monkeypatch, tmp_path, capsys):
    asked = []

    def measure(*args, **how):
        asked.append(args)
        if len(asked) == 9:
            raise KeyboardInterrupt
        return dict.fromkeys(bench.MEASURES, float(len(asked)))

    class Demo:
        text = staticmethod(lambda x: x)
        encode = staticmethod(lambda x: {"samples": torch.zeros(len(x), 4, 2, 2)})

    monkeypatch.setattr(bench, "measure", measure)
    if bench is scale:
        monkeypatch.setattr(bench, "load_demo", Demo)
        monkeypatch.setattr(bench, "environment", lambda demo: {})
        monkeypatch.setattr(bench, "SIZE", 8)
    else:
        monkeypatch.setattr(bench.comfy, "start", lambda argv: None)
        monkeypatch.setattr(bench, "full_size_model", lambda pack: None)
        monkeypatch.setattr(bench, "with_attention", lambda model, part: part)
        monkeypatch.setattr(bench, "LATENT_SIZE", 2)
    with pytest.raises(KeyboardInterrupt):
        bench.run(tmp_path / "x.json", quick=False)
    bench.run(tmp_path / "x.json", quick=False)
    warm_up = 2  # calls that are not counted, at every start
    assert len(asked) == count + 1 + 2 * warm_up
    results = json.loads((tmp_path / "x.json").read_text())
    assert all(results[key] for key in keys)
    if bench is scale:
        cases = {(case["method"], case["frames"]) for case in results["cases"]}
        assert cases == {(method, n) for method in ("whole_clip", "fixed_basis") for n in (8, 16, 32, 64, 128, 256)}
    else:
        assert all(set(results[key]) == set(inversion_cost.METHODS) for key in keys)
    asked.clear()
    bench.run(tmp_path / "x.json", quick=False)
    assert asked == []


def test_options_of_em_are_compared_with_the_paper_clip_by_clip():
    row = lambda psnr, flicker: {"psnr": psnr, "flicker": flicker}  # noqa: E731
    found = {
        "a": {"as the paper": row(40.0, 0.02), "3 iterations": row(41.0, 0.01)},
        "b": {"as the paper": row(30.0, 0.02), "3 iterations": row(29.5, 0.03)},
    }
    rows = em_options.beside_the_paper(found)
    assert rows["3 iterations"] == pytest.approx({"psnr": 35.25, "flicker": 0.02, "psnr_worst": -0.5, "flicker_worst": 0.01})
    assert rows["as the paper"]["psnr_worst"] == rows["as the paper"]["flicker_worst"] == 0


def test_the_first_estimate_of_the_options_is_the_nodes_default():
    assert em_options.PAPER == em_options.BasisSettings(256, 5, 0.01, 0, 0, warm_iterations=0)
    assert em_options.OPTIONS["as the paper"] == {}
    assert all(em_options.PAPER._replace(**change) for change in em_options.OPTIONS.values())
