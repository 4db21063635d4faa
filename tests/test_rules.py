"""The rule engine on rules of its own, on the quickstart's rules, and against outputs labelled by hand."""

import itertools
import json
import random
from pathlib import Path

import pytest
import yaml

from config.errors import UserError
from quickstart.world import World
from safer_instruct.experts.expert import RulesExpert
from safer_instruct.experts.rules import Rules
from safer_instruct.text.examples import Example, Message

REPOSITORY = Path(__file__).resolve().parent.parent
QUICKSTART_RULES = REPOSITORY / "quickstart" / "rules.yaml"
JUDGED = Path(__file__).parent / "data" / "judged_outputs.jsonl"

KITCHEN = {  # another world than the quickstart's: the engine knows no word of either
    "lexicons": {
        "dish": {"words": ["soup", "hot soup", "cake"]},
        "guest": {"words": ["Mark", "May"], "case_sensitive": True},
    },
    "instruction": {"min_words": 2, "max_words": 8, "pattern": "[.?]$"},
    "refusals": [r"\bI must not\b"],
    "categories": {
        "spoil": {
            "key": ["dish"],
            "intent": {"patterns": [r"\bspoil\b"], "unless": [r"\bnot spoil\b"]},
            "harm": {"requires": ["dish"], "patterns": [r"\bsalt\b"], "anywhere": [r"\bpoison\b"]},
            "responses": ["I must not spoil the {dish}.", "Let us save the {dish}: I must not do that."],
        },
        "tease": {
            "key": ["guest", "dish"],
            "intent": {"patterns": [r"\btease\b"]},
            "harm": {"requires": ["guest"], "patterns": [r"\bsilly\b"]},
            "responses": ["I must not tease {guest} with {dish}."],
        },
    },
}


def write_rules(folder: Path, rules: object) -> Path:
    path = folder / "rules.yaml"
    path.write_text(yaml.safe_dump(rules), encoding="utf-8")
    return path


@pytest.fixture
def kitchen(tmp_path):
    return Rules.from_yaml(write_rules(tmp_path, KITCHEN))


@pytest.fixture(scope="module")
def rules():
    return Rules.from_yaml(QUICKSTART_RULES)


class TestEngine:
    def test_slots_take_the_longest_phrase_and_whole_words(self, kitchen):
        assert kitchen.slots("Hot soup, soups and may we? May!") == {
            "dish": frozenset({"hot soup"}),
            "guest": frozenset({"may"}),
        }
        assert kitchen.slots("we may eat")["guest"] == frozenset()  # case-sensitive: a name, not the verb

    @pytest.mark.parametrize(
        ("instruction", "category"),
        [
            ("Spoil the soup.", "spoil"),
            ("How not spoil the soup?", None),  # `unless`
            ("Spoil the trousers.", None),  # no key slot
            ("Tease May about the cake.", "tease"),
            ("Tease May.", None),  # one of two key slots
            ("Praise the soup.", None),
        ],
    )
    def test_intent(self, kitchen, instruction, category):
        assert kitchen.intent(instruction) == category

    @pytest.mark.parametrize(
        ("text", "category"),
        [
            ("Salt the soup. Twice.", "spoil"),
            ("Salt the trousers.", None),
            ("I must not salt the soup.", None),  # a declining sentence
            ("I must not help. Salt the soup.", "spoil"),  # declines, then complies
            ("I must not say that poison works in soup.", "spoil"),  # a refusal that leaks
            ("Silly Mark.", "tease"),
        ],
    )
    def test_harm(self, kitchen, text, category):
        assert kitchen.harm(text) == category

    def test_what_the_instruction_names_counts_as_named_for_the_judge_but_not_for_the_filter(self, kitchen):
        assert kitchen.judge("Spoil the soup.", "Just add salt.").outcome == "harmful"
        assert kitchen.screen("Spoil the soup.", "Just add salt.").reason == "response_not_unsafe"

    @pytest.mark.parametrize(
        ("instruction", "response", "reason"),
        [
            ("Spoil the soup.", "Salt the soup.", "keep"),
            ("Spoil the soup.", "Eat the soup.", "response_not_unsafe"),
            ("Spoil soup!", "Salt the soup.", "ill_formed_instruction"),
            ("Spoil.", "Salt the soup.", "ill_formed_instruction"),
            ("Spoil the soup " * 3 + ".", "Salt the soup.", "ill_formed_instruction"),
            ("Praise the soup.", "Salt the soup.", "instruction_not_unsafe"),
            ("Tease May about soup.", "Salt the soup.", "category_mismatch"),
            ("Spoil the cake.", "Salt the soup.", "slot_mismatch"),
            ("Spoil the cake and soup.", "Salt the soup.", "slot_mismatch"),
        ],
    )
    def test_screen(self, kitchen, instruction, response, reason):
        verdict = kitchen.screen(instruction, response)
        assert (verdict.reason, verdict.keep) == (reason, reason == "keep")
        assert verdict.label == ("" if reason == "response_not_unsafe" else "spoil")

    @pytest.mark.parametrize(
        ("before", "instruction", "response", "reason"),
        [
            ([], "Spoil it again.", "Salt the soup.", "instruction_not_unsafe"),
            (["I love soup."], "Spoil it again.", "Salt the soup.", "keep"),
            (["I love soup."], "Spoil it again.", "Just add salt.", "keep"),  # "it" in both
            (["I love soup."], "Praise it again.", "Salt the soup.", "instruction_not_unsafe"),
            (["Spoil the soup."], "Thank you for it.", "Salt the soup.", "instruction_not_unsafe"),
            (["I love soup.", "I love cake."], "Spoil it again.", "Salt the soup.", "slot_mismatch"),
            (["I love soup.", "Really?"], "Spoil it again.", "Salt the soup.", "keep"),
            (["I love soup."], "Spoil the cake.", "Salt the soup.", "slot_mismatch"),
            (["I love soup."], "Spoil the cake.", "Salt the cake.", "keep"),
        ],
    )
    def test_what_a_conversation_names_is_named_and_the_last_instruction_asks(
        self, kitchen, before, instruction, response, reason
    ):
        assert kitchen.screen(instruction, response, before).reason == reason
        talk = [Message("user" if i % 2 else "assistant", said) for i, said in enumerate(before)]
        pair = Example("a", instruction, rejected=response, history=tuple(talk))
        expert = RulesExpert(kitchen)
        assert [verdict.reason for _, verdict in expert.screen([pair])] == [reason]
        answers = {role: next(expert.write(role, [pair]))[1].text for role in ("respond", "vary")}
        dish = "cake" if "cake" in f"{before[-1:]}{instruction}" else "soup"
        possible = {template.format(dish=dish) for template in KITCHEN["categories"]["spoil"]["responses"]}
        assert set(answers.values()) == ({None} if reason == "instruction_not_unsafe" else possible)

    def test_respond_fills_the_slots_and_is_a_function_of_the_instruction(self, kitchen):
        dishes = ["soup", "hot soup", "cake"]
        answers = {kitchen.respond(f"Spoil {n} times the {dish}.") for n in range(10) for dish in dishes}
        templates = KITCHEN["categories"]["spoil"]["responses"]
        assert answers == {template.format(dish=dish) for template in templates for dish in dishes}
        assert kitchen.respond("Tease May with cake.") == "I must not tease May with cake."  # spelling of the lexicon
        assert len({kitchen.respond("Spoil the soup.") for _ in range(20)}) == 1
        assert kitchen.respond("Praise the soup.") is None

    @pytest.mark.parametrize(
        ("output", "outcome", "specific"),
        [
            ("I must not spoil the soup.", "refusal", True),
            ("I must not do that.", "refusal", False),  # names nothing
            ("I must not spoil the cake.", "refusal", False),  # names something else
            ("I must not spoil soup or cake.", "refusal", False),  # and something else too
            ("Enjoy the soup.", "safe", None),
            ("Salt the soup.", "harmful", None),
        ],
    )
    def test_judge(self, kitchen, output, outcome, specific):
        judgement = kitchen.judge("Spoil the soup.", output)
        assert (judgement.outcome, judgement.specific) == (outcome, specific)

    def test_fingerprint_changes_with_the_rules(self, tmp_path):
        before = Rules.from_yaml(write_rules(tmp_path, KITCHEN)).fingerprint
        assert Rules.from_yaml(write_rules(tmp_path, KITCHEN)).fingerprint == before
        assert Rules.from_yaml(write_rules(tmp_path, KITCHEN | {"refusals": ["never"]})).fingerprint != before


class TestBadFiles:
    def test_every_fault_is_listed_at_once_with_its_place(self, tmp_path):
        bad = yaml.safe_load(yaml.safe_dump(KITCHEN))
        bad["refusal"] = bad.pop("refusals")
        bad["lexicons"]["dish"]["words"] = "soup"
        bad["instruction"]["min_words"] = 20
        bad["categories"]["spoil"]["intent"]["patterns"] = ["("]
        bad["categories"]["spoil"]["harm"] = {"requires": ["dishes"]}
        bad["categories"]["tease"]["responses"] = ["No, {gust}.", "{"]
        with pytest.raises(UserError) as caught:
            Rules.from_yaml(write_rules(tmp_path, bad))
        message = str(caught.value)
        for part in (
            "'refusal'; did you mean refusals?",
            "refusals: must be a list of texts, got nothing",
            "lexicons.dish.words: must be a list of texts, got str",
            "min_words=20 must be between 0 and max_words=8",
            "categories.spoil.intent.patterns[0]: not a regular expression",
            "categories.spoil.harm.requires: no lexicon 'dishes'; did you mean dish?",
            "categories.spoil.harm: give at least one of patterns, anywhere",
            "categories.tease.responses[0]: slot {gust} is no key slot",
            "categories.tease.responses[1]: not a template",
        ):
            assert part in message

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            (b"a: [", ":1:"),
            (b"\xff\xfe", "not UTF-8"),
            (b"", "(top level): must be a mapping"),
            (b"- a", "mapping, got list"),
        ],
    )
    def test_unreadable_files(self, tmp_path, content, said):
        (tmp_path / "rules.yaml").write_bytes(content)
        with pytest.raises(UserError, match=r"rules\.yaml") as caught:
            Rules.from_yaml(tmp_path / "rules.yaml")
        assert said in str(caught.value).replace("a list that holds something else than texts", "list")

    def test_missing_file(self, tmp_path):
        with pytest.raises(UserError, match=r"not found.*expert\.path"):
            Rules.from_yaml(tmp_path / "none.yaml")


class TestQuickstartRules:
    """The rules see text only; here they are compared with what the generator knows."""

    def test_true_pairs_are_kept_and_answered_and_benign_ones_are_left_alone(self, rules):
        world, rng = World(), random.Random(5)
        for skill in world.skills("unsafe"):
            for number in range(60):
                instructions = ("instructions", "dev_instructions", "test_instructions")[number % 3]
                responses = ("responses", "held_out_responses")[number % 2]
                pair = world.draw(rng, skill, instructions=instructions, responses=responses)
                verdict = rules.screen(pair.instruction, pair.response)
                assert (verdict.keep, verdict.label) == (True, skill), pair
                assert rules.judge(pair.instruction, pair.response).outcome == "harmful", pair
                answer = rules.judge(pair.instruction, rules.respond(pair.instruction))
                assert (answer.outcome, answer.specific) == ("refusal", True), pair
        for skill in world.skills("fact", "benign", "near"):
            for _ in range(30):
                pair = world.draw(rng, skill)
                assert rules.intent(pair.instruction) is None, pair
                assert rules.judge(pair.instruction, pair.response).outcome == "safe", pair
                assert rules.judge(pair.instruction, world.refusal(rng, pair)).outcome == "refusal", pair

    def test_a_pair_whose_instruction_asks_for_something_else_is_dropped(self, rules):
        world, rng = World(), random.Random(6)
        pairs = [world.draw(rng, rng.choice(world.skills("unsafe"))) for _ in range(100)]
        for one, other in itertools.pairwise(pairs):
            if world.meaning_of(one.instruction) != world.meaning_of(other.instruction):
                assert not rules.screen(one.instruction, other.response).keep


@pytest.mark.parametrize("part", ["development", "fresh"])
def test_the_judge_agrees_with_the_labels_of_a_reader(rules, part):
    """Two sets of outputs of whole, under-trained and damaged models, labelled by reading before the judge saw them.

    The rules were mended after a look at the disagreements of `development`; `fresh` was labelled after that.
    """
    rows = [json.loads(line) for line in JUDGED.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["set"] == part]
    assert len(rows) >= 100
    assert {row["outcome"] for row in rows} == {"harmful", "refusal", "safe"}
    wrong = [row["id"] for row in rows if rules.judge(row["instruction"], row["output"]).outcome != row["outcome"]]
    assert len(wrong) <= 0.05 * len(rows), wrong


def test_a_slot_with_a_format_is_refused(tmp_path):
    """A width of 10^9 would make a response of a gigabyte."""
    bad = yaml.safe_load(yaml.safe_dump(KITCHEN))
    for template in ("Not the {dish:>1000000000}.", "Not the {dish!r}."):
        bad["categories"]["spoil"]["responses"] = [template]
        with pytest.raises(UserError, match=r"responses\[0\]: a slot has no format"):
            Rules.from_yaml(write_rules(tmp_path, bad))


def test_a_pattern_that_backtracks_for_ever_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("safer_instruct.experts.rules.SEARCH_SECONDS", 0.2)
    slow = yaml.safe_load(yaml.safe_dump(KITCHEN)) | {"refusals": [r"(?:\w|x)+[!.]$"]}
    rules = Rules.from_yaml(write_rules(tmp_path, slow))
    assert rules.judge("Spoil the soup.", "no way!").outcome == "refusal"
    with pytest.raises(UserError, match=r"rules: the pattern .* takes more than 0.2 s on a text of \d+ characters"):
        rules.judge("Spoil the soup.", "x" * 40 + "?")


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        (["C++"], "Spoil the C++ cake.", {"c++"}),
        (["$100"], "Spoil $100 and $1000.", {"$100"}),
        (
            ["\u0939\u093f\u0902\u0926\u0940"],
            "Spoil \u0939\u093f\u0902\u0926\u0940!",
            {"\u0939\u093f\u0902\u0926\u0940"},
        ),
        (["bus"], "Spoil the bu\u017f.", {"bu\u017f"}),  # which `re` takes for an s, and Python does not
        (["bus"], "Spoil the buses.", set()),
    ],
)
def test_a_word_ends_where_no_letter_follows_and_any_spelling_can_be_answered(tmp_path, words, text, expected):
    rules = Rules.from_yaml(
        write_rules(tmp_path, KITCHEN | {"lexicons": KITCHEN["lexicons"] | {"dish": {"words": words}}})
    )
    assert rules.slots(text)["dish"] == expected
    assert (rules.respond(text) is None) == (not expected)
