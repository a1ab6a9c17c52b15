"""
Exercises: write functions of this project yourself, graded by its own tests.

  python lessons/exercises.py              the exercises, and how far you are with each
  python lessons/exercises.py show rope    what to do; show rope 1 adds the first hint
  python lessons/exercises.py start rope   empties the function, in the file itself
  python lessons/exercises.py check rope   runs its tests; an answer that passes is kept in
                                           lessons/answers/

Meanwhile training, sampling and all other tests run on what you wrote. `git diff` compares it with
what was there, and `git restore` brings that back, for the next exercise.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "lessons" / "exercises.md"
ANSWERS = ROOT / "lessons" / "answers"
TODO = "raise NotImplementedError"

# name: the functions to write, as file:function, and the tests that grade them
EXERCISES = {
    "mlp": (
        ["model.py:MLP.forward"],
        [
            "test_loss_and_gradients_equal_transformers",
            "test_equal_to_starcoder2_at_every_length",
            "test_dropout_acts_in_training_only",
        ],
    ),
    "init": (
        ["model.py:GPT.__init__"],
        [
            "test_number_of_parameters_of_the_four_released_sizes",
            "test_embedding_and_head_are_one_tensor_unless_untied",
            "test_without_bias_there_is_none",
            "test_initialisation_scales_residual_projections_by_depth",
            "test_initial_loss_is_that_of_a_uniform_guess",
            "test_rope_replaces_learned_positions_and_reads_past_block_size",
            "test_windows_are_one_per_layer_and_0_is_full_attention",
        ],
    ),
    "flops": (
        ["model.py:GPT.flops_per_token", "model.py:keys_per_query"],
        [
            "test_flops_per_token_is_what_torch_counts",
            "test_keys_per_query_counts_what_attention_computes",
        ],
    ),
    "names": (
        ["plumbing/architectures.py:tensor_names"],
        [
            "test_every_form_of_a_GPT2_folder_loads",
            "test_every_form_of_a_StarCoder2_folder_loads",
            "test_logits_and_text_are_those_of_transformers_and_the_way_back_is_exact",
        ],
    ),
    "attend": (
        ["model.py:attend"],
        [
            "test_attend_is_softmax_by_hand",
            "test_attend_without_a_mask_sees_every_key_of_a_cache",
            "test_attend_under_dropout_has_the_mean_of_that_without",
            "test_future_never_leaks_into_the_past",
            "test_loss_and_gradients_equal_transformers",
        ],
    ),
    "sample": (
        ["model.py:sample"],
        [
            "test_sampling_follows_the_distribution_of_transformers",
            "test_greedy_takes_the_likeliest_token",
            "test_lowest_temperature_is_greedy",
            "test_top_p_of_1_excludes_nothing",
        ],
    ),
    "rope": (
        ["model.py:rotate"],
        [
            "test_rotation_is_a_product_of_complex_numbers",
            "test_rope_scores_depend_on_relative_position_only_and_on_every_step_of_it",
            "test_rotation_keeps_lengths_and_leaves_position_0_alone",
            "test_bfloat16_is_rotated_in_float32",
            "test_equal_to_starcoder2_at_every_length",
        ],
    ),
    "gqa": (
        ["model.py:copy_heads", "plumbing/conversion.py:average_heads"],
        [
            "test_attend_is_softmax_by_hand",
            "test_gqa_equals_multi_head_with_repeated_heads",
            "test_mean_of_identical_heads_changes_nothing",
            "test_pooled_head_is_the_mean_of_those_it_replaces",
            "test_fewer_heads_cannot_become_more",
        ],
    ),
    "visible": (
        ["model.py:visible"],
        [
            "test_visible_is_the_definition",
            "test_window_sees_exactly_W_keys",
            "test_receptive_field_after_L_layers_is_L_times_W_minus_1_plus_1",
        ],
    ),
    "blocks": (
        ["model.py:attend_in_blocks"],
        [
            "test_blocks_equal_the_mask_forward_and_backward",
            "test_blocks_under_dropout_have_the_mean_of_those_without",
            "test_keys_per_query_counts_what_attention_computes",
            "test_flops_per_token_is_what_torch_counts",
        ],
    ),
    "ring": (
        ["model.py:LayerCache.read", "model.py:LayerCache.write"],
        [
            "test_ring_holds_the_last_W_positions",
            "test_cached_equals_uncached_in_chunks_past_several_wraps",
            "test_cached_equals_uncached_in_chunks_of_every_size_in_turn",
            "test_cache_keeps_no_history_of_gradients",
            "test_cache_is_allocated_once",
        ],
    ),
    "accumulate": (
        ["train.py:accumulate_gradients"],
        [
            "test_accumulation_changes_nothing_but_rounding",
            "test_first_step_equals_one_written_out_by_hand",
            "test_gradients_are_sent_once_per_step_however_many_parts_it_has",
        ],
    ),
    "schedule": (
        ["train.py:lr_at", "train.py:make_optimizers"],
        [
            "test_learning_rate_warms_up_and_follows_a_cosine",
            "test_learning_rate_ends_at_a_tenth_after_the_last_step_unless_told_otherwise",
            "test_first_step_equals_one_written_out_by_hand",
            "test_muon_moves_the_matrices_inside_the_blocks_and_adamw_the_rest",
        ],
    ),
    "ddp": (
        ["train.py:replicate"],
        [
            "test_every_mode_gives_the_losses_and_gradient_norms_of_one_process",
            "test_every_mode_resumes_its_own_checkpoint_to_the_bit",
        ],
    ),
    "fsdp": (
        ["train.py:shard"],
        [
            "test_every_mode_gives_the_losses_and_gradient_norms_of_one_process",
            "test_with_FSDP_each_process_holds_one_part_of_N",
        ],
    ),
    "order": (
        ["plumbing/token_files.py:Data.batch"],
        [
            "test_every_token_is_seen_once_per_epoch",
            "test_epochs_differ_in_order_and_in_where_windows_begin",
            "test_batch_is_a_function_of_seed_and_number_alone",
        ],
    ),
    "resume": (
        ["plumbing/checkpoints.py:restore_optimizers"],
        [
            "test_resumed_run_is_exact_to_the_bit",
            "test_optimizer_state_of_another_model_is_one_clear_line",
            "test_every_mode_continues_from_a_checkpoint_of_every_other",
        ],
    ),
}


def find(source, qualified_name):
    """The node of a function, or of a method as Class.method, in the source of a file"""
    node = ast.parse(source)
    for name in qualified_name.split("."):
        inside = {child.name: child for child in node.body if hasattr(child, "name")}
        if name not in inside:
            return None
        node = inside[name]
    return node


def source_of(source, qualified_name):
    """The text of a function; "" if there is none of this name"""
    node = find(source, qualified_name)
    return ast.get_source_segment(source, node, padded=True) if node else ""


def empty(source, qualified_name):
    """The source of a file with this function's body replaced; signature and docstring stay."""
    node = find(source, qualified_name)
    lines = source.splitlines(keepends=True)
    statements = node.body
    if ast.get_docstring(node) is not None:
        statements = statements[1:]
    first = statements[0].lineno - 1
    while lines[first - 1].strip().startswith("#"):   # comments on it go, too
        first -= 1
    indent = " " * (node.col_offset + 4)
    return "".join([*lines[:first], f"{indent}{TODO}\n", *lines[node.end_lineno:]])


def read(file):
    return (ROOT / file).read_text(encoding="utf-8")


def functions_of(name):
    """Yield file, qualified name, and the source of the function as it is now"""
    for function in EXERCISES[name][0]:
        file, qualified_name = function.split(":")
        try:
            yield file, qualified_name, source_of(read(file), qualified_name)
        except SyntaxError as e:
            sys.exit(f"error: {file}, line {e.lineno}: {e.msg}")


def files_of(name):
    """The files that an exercise is in, without repetition"""
    functions, _ = EXERCISES[name]
    return list(dict.fromkeys(function.split(":")[0] for function in functions))


class NoGit(Exception):
    """Git is missing, or this folder is not one of its repositories."""


def git(*arguments):
    """What a git command prints"""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8")
    except FileNotFoundError:
        raise NoGit("git is not installed") from None
    if done.returncode != 0:
        raise NoGit(done.stderr.strip())
    return done.stdout


def answer_of(name):
    """The functions of an exercise as they are now, in one text"""
    return "\n\n\n".join(source for _, _, source in functions_of(name)) + "\n"


def is_committed(name):
    """Whether the functions are those of the last commit, so not an answer"""
    return all(source == source_of(git("show", f"HEAD:./{file}"), qualified_name)
               for file, qualified_name, source in functions_of(name))


def is_started(name):
    return TODO in answer_of(name)


def state(name):
    kept = ANSWERS / f"{name}.py"
    if is_started(name):
        return "started"
    if kept.exists() and kept.read_text(encoding="utf-8") == answer_of(name):
        return "solved"
    try:
        if not is_committed(name):
            return "written: check it"
    except NoGit:
        pass
    return "solved" if kept.exists() else ""


def show_list():
    print(__doc__)
    for name, (functions, _) in EXERCISES.items():
        print(f"  {name:11}{state(name):19}{', '.join(functions)}")


def start(name):
    if is_started(name):
        sys.exit(f"error: {name} is started: write it, then python lessons/exercises.py check "
                 f"{name}")
    files = files_of(name)
    changed = git("status", "--porcelain", "--", *files).split("\n")[0][3:]
    if changed:
        sys.exit(f"error: {changed} has changes that are not committed. Answers that passed their "
                 "check are kept in lessons/answers; to bring the file back: "
                 f"git restore --staged --worktree {changed}")
    for file, qualified_name, _ in functions_of(name):
        (ROOT / file).write_text(empty(read(file), qualified_name), encoding="utf-8", newline="\n")
        print(f"{file}: the body of {qualified_name} is yours to write")
    print(f"then: python lessons/exercises.py check {name}; "
          f"to bring back what was there: git restore {' '.join(files)}")


def located(tests):
    """The tests as pytest finds them, file::test"""
    found = {}
    for path in (ROOT / "test_model.py", *sorted((ROOT / "tests").glob("test_*.py"))):
        for test in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            found[test] = f"{path.relative_to(ROOT)}::{test}"
    return [found[test] for test in tests]


def check(name):
    answer = answer_of(name)
    _, graders = EXERCISES[name]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=3"]
    status = subprocess.run([*command, *located(graders)], cwd=ROOT).returncode
    if status == 0 and not is_committed(name):
        ANSWERS.mkdir(exist_ok=True)
        (ANSWERS / f"{name}.py").write_text(answer, encoding="utf-8", newline="\n")
    sys.exit(status)


def show(name, hints):
    """Print the section of exercises.md on this exercise, with as many of its hints"""
    text = PAGE.read_text(encoding="utf-8")
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)[1]
    task, *given = re.split(r"<details><summary>Hint \d+</summary>\n", section)
    given = [hint.split("</details>")[0].strip() for hint in given]
    print(task.strip())
    print(f"\nGraded by {', '.join(located(EXERCISES[name][1]))}")
    for i, hint in enumerate(given[:hints], 1):
        print(f"\nHint {i} of {len(given)}: {hint}")
    if hints < len(given):
        print(f"\nfor a hint: python lessons/exercises.py show {name} {hints + 1}")


def main(argv):
    if not argv or argv[0] in ("-h", "--help", "list"):
        return show_list()
    command, *rest = argv
    name = rest[0] if rest else None
    if command not in ("show", "start", "check"):
        sys.exit(f"error: {command}: unknown; choose from show, start, check, or give nothing for "
                 "the list")
    if name not in EXERCISES:
        sys.exit(f"error: {command} {name or 'what?'}: choose from {', '.join(EXERCISES)}")
    hints = rest[1] if command == "show" and len(rest) == 2 else "0"
    if len(rest) > 2 or (len(rest) == 2 and command != "show") or not hints.isdecimal():
        sys.exit(f"error: {' '.join(argv)}: expected a name; after show, a number of hints may "
                 "follow")
    if command == "show":
        show(name, int(hints))
    elif command == "start":
        start(name)
    else:
        check(name)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:   # `head`, for example, has seen enough
        os._exit(0)
    except NoGit as e:
        sys.exit("error: git is needed to keep the code that you replace; clone the project "
                 f"instead of downloading its files. It says: {' '.join(str(e).split())}")
