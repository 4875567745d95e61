"""Typical mistakes: what `task=check` says about each, the place and the remedy, in one message.

A row is what is typed behind `task=check`, words of the place, words of the remedy.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from ditty_di.__main__ import main

FILES = {
    "steps": "stpes: 3",
    "optimiser": "optimiser: {lr: 1.0}",
    "rate": "lr: 1.0e-3",
    "callbacks": "callback: {ema: {_target_: ditty_di.callbacks.EMA}}",
    "depth": "trainer: {maxnorm: 2}\ndata: {loader: {batchsize: 4}}\noptimizer: {learning_rate: 1}",
    "target": "model: {_target: torch.nn.Linear}",
    "reference": "steps: ${stps}",
    "width": "data: {seq_len: '${optimizer.lr}'}",
    "no": "seed: no",
    "yes": "steps: yes",
    "typed": "steps: '100'",
    "twice": "steps: 1\nsteps: 2",
    "open": "steps: [3",
    "unset": "steps: null",
    "helper": "mine: {deep: {er: 1}}",
    "hook": "hydra: {callbacks: {x: {_target_: shutil.copyfile, src: a, dst: b}}}",
    "logs": "hydra: {job_logging: {formatters: {x: {(): os.system, command: touch x}}}}",
    "tab": "data:\n\tseq_len: 3",
}
UNPACKAGED = {
    "bare": "steps: 3",
    "late": "\n# what it is for\n# @package _global_\nsteps: 3",
}

#: What is typed; the place; the remedy.
MISTAKES = [
    # keys
    ("+experiment=steps", "conf/experiment/steps.yaml:2: stpes", "did you mean 'steps'?"),
    ("+experiment=optimiser", "conf/experiment/optimiser.yaml:2", "did you mean 'optimizer'?"),
    ("+experiment=rate", "conf/experiment/rate.yaml:2: lr", "did you mean 'optimizer.lr'?"),
    ("+experiment=callbacks", "callbacks.yaml:2: callback", "did you mean 'callbacks'?"),
    ("+experiment=helper", "conf/experiment/helper.yaml:2: mine", "allow_unread: [mine]"),
    ("+experiment=bare", "conf/experiment/bare.yaml", "first line: # @package _global_"),
    ("+experiment=late", "conf/experiment/late.yaml", "first line: # @package _global_"),
    ("+experiment=depth", "depth.yaml:2: trainer.maxnorm", "did you mean 'max_norm'?"),
    ("+experiment=depth", "depth.yaml:3: data.loader.batchsize", "did you mean 'batch_size'?"),
    ("+experiment=depth", "depth.yaml:4: optimizer.learning_rate", "did you mean 'lr'?"),
    ("+experiment=target", "target.yaml:2: model._target", "did you mean '_target_'?"),
    ("+experiment=reference", "reference.yaml:2: steps", "did you mean 'steps'?"),
    ("+optimiser.lr=9", "'+optimiser.lr=9'", "did you mean 'optimizer'?"),
    ("+optimizer.lrr=9", "'+optimizer.lrr=9'", "did you mean 'lr'?"),
    ("+stpes=9", "'+stpes=9'", "did you mean 'steps'?"),
    ("adapter=lora model=dit_digits", "'adapter=lora'", "nothing reads this choice"),
    ("quantize=nf4 model=dit_digits", "'quantize=nf4'", "nothing reads this choice"),
    ("optimizer=adamww", "optimizer/adamww", "did you mean 'adamw'?"),
    ("optimizr=adamw", "'optimizr'", "did you mean 'optimizer'?"),
    ("+experiment=qlor", "experiment/qlor", "did you mean 'qlora'?"),
    ("precision=bf17", "precision/bf17", "did you mean 'bf16'?"),
    ("model._target_=my.model.Net", "model._target_=my.model.Net", "no module 'my'"),
    ("model._target_=torch.nn.Liner", "model._target_", "did you mean 'torch.nn.Linear'?|'Linear'"),
    # other trainers' names
    ("trainer.grad_clip=1", "'trainer.grad_clip'", "did you mean 'trainer.max_norm'?"),
    ("lr=1e-3", "'lr'", "did you mean 'optimizer.lr'?"),
    ("learning_rate=1e-3", "'learning_rate'", "did you mean 'optimizer.lr'?"),
    ("max_steps=10", "'max_steps'", "did you mean 'steps'?"),
    ("num_train_epochs=3", "'num_train_epochs'", "did you mean 'epochs'?"),
    ("per_device_train_batch_size=4", "batch_size'", "did you mean 'data.loader.batch_size'?"),
    ("gradient_accumulation_steps=4", "gradient_", "did you mean 'global_batch_size'?"),
    ("max_grad_norm=1", "'max_grad_norm'", "did you mean 'trainer.max_norm'?"),
    ("warmup_steps=10", "'warmup_steps'", "did you mean 'lr_scheduler.warmup_steps'?"),
    ("bf16=true", "'bf16'", "did you mean 'precision=bf16'?"),
    ("output_dir=x", "'output_dir'", "did you mean 'run'?"),
    ("save_steps=10", "'save_steps'", "did you mean 'checkpoint.every'?"),
    ("eval_steps=10", "'eval_steps'", "did you mean 'validator.every'?"),
    ("logging_steps=10", "'logging_steps'", "did you mean 'metrics.every'?"),
    ("max_seq_length=10", "'max_seq_length'", "did you mean 'data.seq_len'?"),
    ("+experiment=lora lora_r=8", "'lora_r'", "did you mean 'adapter.config.r'?"),
    ("+experiment=lora lora_alpha=8", "'lora_alpha'", "'adapter.config.lora_alpha'"),
    ("lora_r=8", "'lora_r'", "'adapter.config.r', which is not in this configuration"),
    (
        "trainer.callbacks.ema.decay=0.9",
        "'trainer.callbacks.ema.decay'",
        "'callbacks=ema' adds it",
    ),
    (
        "trainer.callbacks.stopfile.path=x",
        "callbacks.stopfile",
        "'callbacks.stop_file.path'",
    ),
    ("~loss", "config.yaml", "'~loss' deleted it, so delete 'trainer.loss_fn' too"),
    ("export=none +export.x=3", "'+export.x=3': export", "a callable is wanted"),
    # values
    ("steps=-5", "'steps=-5': steps", "at least 1"),
    ("steps=1.5", "'steps=1.5': steps", "int is wanted"),
    ("steps=True", "'steps=True': steps", "int is wanted"),
    ("steps=5,6", "steps='5,6'", "for a sweep over these values add --multirun"),
    ("steps=many", "'steps=many'", "int is wanted"),
    ("+experiment=typed", "conf/experiment/typed.yaml:2: steps", "write it without quotes"),
    ("+experiment=no", "conf/experiment/no.yaml:2: seed", "is false, and int is wanted"),
    ("+experiment=yes", "conf/experiment/yes.yaml:2: steps", "is true, and int is wanted"),
    ("+experiment=unset", "horizon", "exactly one of steps and epochs"),
    ("epochs=2", "horizon", "null unsets one"),
    ("steps=null epochs=-1", "'epochs=-1': epochs", "above 0"),
    ("+experiment=width", "width.yaml:2: data.seq_len", "int is wanted"),
    ("trainer.steps=${optimizer.lr}", "trainer.steps", "(it is optimizer.lr)"),
    ("seed=-1", "'seed=-1': seed", "must not be negative"),
    ("data.loader.batch_size=0", "data.loader.batch_size=0'", "at least 1"),
    ("+data.loader.num_workers=-1", "num_workers=-1'", "must not be negative"),
    ("global_batch_size=0", "'global_batch_size=0'", "at least 1"),
    ("global_batch_size=7", "'global_batch_size=7'", "not a multiple of the 8 rows"),
    ("data.seq_len=0", "'data.seq_len=0': data.seq_len", "at least 1"),
    ("trainer.max_norm=-1", "'trainer.max_norm=-1'", "above 0"),
    ("optimizer.lr=-1", "'optimizer.lr=-1': optimizer.lr", "Invalid learning rate"),
    ("optimizer.lr=fast", "'optimizer.lr=fast': optimizer.lr", "float is wanted"),
    ("optimizer.optimizer.betas=[0.9,1.5]", "optimizer.optimizer.betas: ", "Invalid beta"),
    ("optimizer=sgd optimizer.lr=-1", "'optimizer.lr=-1': optimizer.lr", "Invalid learning rate"),
    ("lr_scheduler.warmup_steps=500", "warmup_steps=500'", "phases of 300 updates or less"),
    ("lr_scheduler.min_lr_ratio=3", "'lr_scheduler.min_lr_ratio=3'", "between 0 and 1"),
    ("checkpoint.every=0", "'checkpoint.every=0'", "null for no limit"),
    ("checkpoint.keep=0", "'checkpoint.keep=0'", "null for no limit"),
    ("validator.max_batches=0", "validator.max_batches=0'", "at least 1"),
    ("metrics.every=0", "'metrics.every=0': metrics.every", "at least 1"),
    ("launcher.nproc=two", "'launcher.nproc=two': launcher.nproc", "int is wanted"),
    ("launcher.nproc=0", "'launcher.nproc=0': launcher.nproc", "give the number of ranks"),
    ("launcher.nproc=3", "'launcher.nproc=3'", "3 ranks x 8 rows"),
    ("runtime.dp_shard=0", "'runtime.dp_shard=0'", "-1 for what the world size leaves"),
    (
        "launcher.nproc=2 runtime.dp_shard=3",
        "'runtime.dp_shard=3'",
        "needs 3 ranks but there are 2",
    ),
    ("+experiment=lora adapter.config.r=0", "adapter.config.r: ", "at least 1"),
    ("+experiment=full model.dtype=bf16", "'model.dtype=bf16'", "write float32, bfloat16"),
    ("callbacks=ema callbacks.ema.decay=2", "callbacks.ema.decay", "below 1"),
    # files
    ("+experiment=full model.path=./nowhere", "model.path", "there is no folder nowhere"),
    ("data=text data.corpus.path=nowhere", "data.corpus.path", "expected a .txt or .jsonl file"),
    ("+experiment=twice", "twice.yaml", "duplicate key steps"),
    ("+experiment=open", "open.yaml", "line 3"),
    # the command itself
    ("+experiment=full data.path=[a,b]", "data.path=[a,b]", "'~data.path' '+data.path=[a,b]'"),
    ("steps", "'steps'", "write KEY=VALUE"),
    ("+experiment=hook", "hydra.callbacks.x._target_", "allow_targets=[shutil.copyfile]"),
    ("+experiment=logs", "hydra.job_logging.formatters.x.()", "'os.system' is refused"),
    ("+experiment=tab", "tab.yaml", "indent with spaces"),
    (
        "optimizer.optimizer.eps=-1",
        "optimizer.optimizer.eps",
        "'+optimizer.optimizer.eps=-1'|: +opt",
    ),
    ("trainer.contracts=foo", "'trainer.contracts=foo'", "write static, runtime"),
    ("+export.foo=1", "'+export.foo=1': export.foo", "'foo' is not a parameter"),
    ("name=../../esc", "'name=../../esc': name", "without '..'"),
    ("run=typo", "run=typo", "no such run"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    experiments = folder / "conf" / "experiment"
    experiments.mkdir(parents=True)
    for name, text in FILES.items():
        (experiments / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    for name, text in UNPACKAGED.items():
        (experiments / f"{name}.yaml").write_text(f"{text}\n")
    return folder


def said(arguments: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    task = [] if arguments.startswith("run=") else ["task=check"]
    code = main([*task, *arguments.split()])
    out, err = capsys.readouterr()
    assert code == 2, out
    assert not (folder / "outputs").exists()
    return err


@pytest.mark.parametrize(("typed", "place", "remedy"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_message_with_place_and_remedy(
    typed: str,
    place: str,
    remedy: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    err = said(typed, folder, capsys)
    lines = [line for line in textwrap.dedent(err).splitlines() if place in line]
    assert lines, err
    assert any(words in err for words in remedy.split("|")), err
    assert "Traceback" not in err and "hydra.cc" not in err


def test_keys_that_only_others_read_are_no_mistakes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    (folder / "conf" / "experiment" / "fine.yaml").write_text(
        textwrap.dedent(
            """\
            # @package _global_
            defaults: [{override /validator: null}]
            prompt: of another task
            helper: 3
            other: 4
            unused: {x: {y: 1}}
            allow_unread: [unused]
            steps: ${helper}
            global_batch_size: ${oc.select:other,16}
            data: {loader: {batch_size: 4}, validation_loader: {batch_size: 2}}
            export: {dtype: bfloat16}
            """
        )
    )
    check = ["task=check", "task.rehearse=false"]
    for typed in ("+experiment=fine", "+experiment=fine adapter=none", "+experiment=flow_matching"):
        assert main([*check, *typed.split()]) == 0, capsys.readouterr().err
    assert main(["task=explain", "key=steps", "+experiment=steps"]) == 0, "a look is not refused"
