"""Typical mistakes: what `task=check` says about each, the place and the remedy, in one message.

A row is what is typed behind `task=check`, words of the place, words of the remedy.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from ditty_di.__main__ import main

FILES = {
    "steps": "max_stpes: 3",
    "stpes": "stpes: 3",
    "optimiser": "optimiser: {lr: 1.0}",
    "rate": "lr: 1.0e-3",
    "callbacks": "callback: {ema: {_target_: ditty_di.callbacks.EMA}}",
    "depth": (
        "trainer: {max_gradnorm: 2}\n"
        "data: {loader: {micro_batchsize: 4}}\n"
        "optimizer: {learning_rate: 1}"
    ),
    "target": "model: {_target: torch.nn.Linear}",
    "reference": "max_steps: ${max_stps}",
    "width": "data: {seq_len: '${optimizer.lr}'}",
    "no": "seed: no",
    "yes": "max_steps: yes",
    "typed": "max_steps: '100'",
    "twice": "max_steps: 1\nmax_steps: 2",
    "open": "max_steps: [3",
    "unset": "max_steps: null",
    "helper": "mine: {deep: {er: 1}}",
    "hook": "hydra: {callbacks: {x: {_target_: shutil.copyfile, src: a, dst: b}}}",
    "logs": "hydra: {job_logging: {formatters: {x: {(): os.system, command: touch x}}}}",
    "tab": "data:\n\tseq_len: 3",
}
UNPACKAGED = {
    "bare": "max_steps: 3",
    "late": "\n# what it is for\n# @package _global_\nmax_steps: 3",
}

#: What is typed; the place; the remedy.
MISTAKES = [
    # keys
    ("+experiment=steps", "conf/experiment/steps.yaml:2: max_stpes", "did you mean 'max_steps'?"),
    ("+experiment=stpes", "conf/experiment/stpes.yaml:2: stpes", "did you mean 'max_steps'?"),
    ("trainer.grad_clp=1", "'trainer.grad_clp'", "did you mean 'trainer.max_grad_norm'?"),
    ("optimizer.learnig_rate=1", "learnig_rate'", "did you mean 'optimizer.lr'?"),
    ("+experiment=optimiser", "conf/experiment/optimiser.yaml:2", "did you mean 'optimizer'?"),
    ("+experiment=rate", "conf/experiment/rate.yaml:2: lr", "did you mean 'optimizer.lr'?"),
    ("+experiment=callbacks", "callbacks.yaml:2: callback", "did you mean 'callbacks'?"),
    ("+experiment=helper", "conf/experiment/helper.yaml:2: mine", "allow_unread: [mine]"),
    ("+experiment=bare", "conf/experiment/bare.yaml", "first line: # @package _global_"),
    ("+experiment=late", "conf/experiment/late.yaml", "first line: # @package _global_"),
    ("+experiment=depth", "depth.yaml:2: trainer.max_gradnorm", "did you mean 'max_grad_norm'?"),
    (
        "+experiment=depth",
        "depth.yaml:3: data.loader.micro_batchsize",
        "did you mean 'micro_batch_size'?",
    ),
    ("+experiment=depth", "depth.yaml:4: optimizer.learning_rate", "did you mean 'lr'?"),
    ("+experiment=target", "target.yaml:2: model._target", "did you mean '_target_'?"),
    ("+experiment=reference", "reference.yaml:2: max_steps", "did you mean 'max_steps'?"),
    ("+optimiser.lr=9", "'+optimiser.lr=9'", "did you mean 'optimizer'?"),
    ("+optimizer.lrr=9", "'+optimizer.lrr=9'", "did you mean 'lr'?"),
    ("+max_stpes=9", "'+max_stpes=9'", "did you mean 'max_steps'?"),
    ("adapter=lora model=dit_digits", "'adapter=lora'", "nothing reads this choice"),
    ("quantize=nf4 model=dit_digits", "'quantize=nf4'", "nothing reads this choice"),
    ("optimizer=adamww", "optimizer/adamww", "did you mean 'adamw'?"),
    ("optimizr=adamw", "'optimizr'", "did you mean 'optimizer'?"),
    ("+experiment=qlor", "experiment/qlor", "did you mean 'qlora'?"),
    ("precision=bf17", "precision/bf17", "did you mean 'bf16'?"),
    ("model._target_=my.model.Net", "model._target_=my.model.Net", "no module 'my'"),
    ("model._target_=torch.nn.Liner", "model._target_", "did you mean 'torch.nn.Linear'?|'Linear'"),
    # other trainers' names
    ("checkpoint.every=5", "'checkpoint.every'", "did you mean 'checkpoint.save_interval'?"),
    ("metrics.every=5", "'metrics.every'", "did you mean 'logger.log_interval'?"),
    ("metrics=quiet", "'metrics'", "did you mean 'logger'?"),
    ("~metrics.writers.console", "'metrics.writers", "did you mean 'logger.loggers.console'?"),
    ("data.loader.batch_size=2", "batch_size'", "did you mean 'data.loader.micro_batch_size'?"),
    ("recompute=full", "'recompute'", "did you mean 'activation_checkpointing'?"),
    ("trainer.grad_clip=1", "'trainer.grad_clip'", "did you mean 'trainer.max_grad_norm'?"),
    ("lr=1e-3", "'lr'", "did you mean 'optimizer.lr'?"),
    ("learning_rate=1e-3", "'learning_rate'", "did you mean 'optimizer.lr'?"),
    ("steps=10", "'steps'", "did you mean 'max_steps'?"),
    ("num_train_epochs=3", "'num_train_epochs'", "did you mean 'epochs'?"),
    (
        "per_device_train_batch_size=4",
        "batch_size'",
        "did you mean 'data.loader.micro_batch_size'?",
    ),
    ("gradient_accumulation_steps=4", "gradient_", "did you mean 'global_batch_size'?"),
    ("max_grad_norm=1", "'max_grad_norm'", "did you mean 'trainer.max_grad_norm'?"),
    ("warmup_steps=10", "'warmup_steps'", "did you mean 'lr_scheduler.warmup_steps'?"),
    ("bf16=true", "'bf16'", "did you mean 'precision=bf16'?"),
    ("output_dir=x", "'output_dir'", "did you mean 'run'?"),
    ("save_steps=10", "'save_steps'", "did you mean 'checkpoint.save_interval'?"),
    ("eval_steps=10", "'eval_steps'", "did you mean 'validator.eval_interval'?"),
    ("logging_steps=10", "'logging_steps'", "did you mean 'logger.log_interval'?"),
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
    (
        "optimizer=adamw optimizer.betas=[1,2] optimizer.epz=1",
        "'optimizer.betas'",
        "+optimizer.betas",
    ),
    ("trainer.optimizer.lr=1", "optimizer is ${optimizer}", "write optimizer.lr=..."),
    ("+trainer.optimizer.lr=1", "optimizer is ${optimizer}", "write optimizer.lr=..."),
    ("trainer.dataloader.micro_batch_size=1", "trainer.dataloader is", "data.loader.micro_batch"),
    (
        "callbacks=ema +trainer.callbacks.x={_target_:ditty_di.callbacks.EarlyStopping}",
        "'callbacks=ema': callbacks: nothing reads this choice",
        "write +callbacks.x=...",
    ),
    ("~loss", "config.yaml", "'~loss' deleted it, so delete 'trainer.loss_fn' too"),
    ("export=none +export.x=3", "'+export.x=3': export", "a callable is wanted"),
    # values
    ("max_steps=-5", "'max_steps=-5': max_steps", "at least 1"),
    ("max_steps=1.5", "'max_steps=1.5': max_steps", "int is wanted"),
    ("neftune=default neftune.alpha=-1", "'neftune.alpha=-1': neftune", "must be above 0"),
    ("precision=fp8 precision.convert.recipe=x", "recipe=x': precision.convert", "'tensorwise'"),
    ("parallelize.param_dtype=bfloat17", "bfloat17': parallelize.param_dtype", "such as bfloat16"),
    ("+parallelize.prefetch_blocks=-1", "'+parallelize.prefetch_blocks=-1'", "not be negative"),
    ("data.sample_text.max_new_tokens=0", "data.sample_text.max_new_tokens", "at least 1"),
    ("max_steps=True", "'max_steps=True': max_steps", "int is wanted"),
    ("max_steps=5,6", "max_steps='5,6'", "for a sweep over these values add --multirun"),
    ("max_steps=many", "'max_steps=many'", "int is wanted"),
    ("+experiment=typed", "conf/experiment/typed.yaml:2: max_steps", "write it without quotes"),
    ("+experiment=no", "conf/experiment/no.yaml:2: seed", "is false, and int is wanted"),
    ("+experiment=yes", "conf/experiment/yes.yaml:2: max_steps", "is true, and int is wanted"),
    ("+experiment=unset", "training_steps", "exactly one of max_steps and epochs"),
    ("epochs=2", "training_steps", "null unsets one"),
    ("max_steps=null epochs=-1", "'epochs=-1': epochs", "above 0"),
    ("+experiment=width", "width.yaml:2: data.seq_len", "int is wanted"),
    ("trainer.max_steps=${optimizer.lr}", "trainer.max_steps", "(it is optimizer.lr)"),
    ("seed=-1", "'seed=-1': seed", "must not be negative"),
    ("data.loader.micro_batch_size=0", "data.loader.micro_batch_size=0'", "at least 1"),
    ("+data.loader.num_workers=-1", "num_workers=-1'", "must not be negative"),
    ("global_batch_size=0", "'global_batch_size=0'", "at least 1"),
    ("global_batch_size=7", "'global_batch_size=7'", "not a multiple of the 8 rows"),
    ("data.seq_len=0", "'data.seq_len=0': data.seq_len", "at least 1"),
    ("trainer.max_grad_norm=-1", "'trainer.max_grad_norm=-1'", "above 0"),
    ("optimizer.lr=-1", "'optimizer.lr=-1': optimizer.lr", "Invalid learning rate"),
    ("optimizer.lr=inf", "'optimizer.lr=inf': optimizer", "write a finite learning rate"),
    ("optimizer.lr=fast", "'optimizer.lr=fast': optimizer.lr", "float is wanted"),
    ("optimizer.optimizer.betas=[0.9,1.5]", "optimizer.optimizer.betas: ", "Invalid beta"),
    ("optimizer=sgd optimizer.lr=-1", "'optimizer.lr=-1': optimizer.lr", "Invalid learning rate"),
    ("lr_scheduler.warmup_steps=500", "warmup_steps=500'", "phases of 300 updates or less"),
    ("lr_scheduler.min_lr_ratio=3", "'lr_scheduler.min_lr_ratio=3'", "between 0 and 1"),
    ("checkpoint.save_interval=0", "'checkpoint.save_interval=0'", "null for no limit"),
    ("checkpoint.keep_latest_k=0", "'checkpoint.keep_latest_k=0'", "null for no limit"),
    ("validator.max_batches=0", "validator.max_batches=0'", "at least 1"),
    ("logger.log_interval=0", "'logger.log_interval=0': logger.log_interval", "at least 1"),
    ("launcher.nproc=two", "'launcher.nproc=two': launcher.nproc", "int is wanted"),
    ("launcher.nproc=0", "'launcher.nproc=0': launcher.nproc", "give the number of ranks"),
    ("launcher.nproc=3", "'launcher.nproc=3'", "3 ranks x 8 rows"),
    ("runtime.tp=3", "'runtime.tp=3': runtime.tp", "4 heads; tp fits 1, 2"),
    ("runtime.cp=2 +loss.shift=true", "'runtime.cp=2': runtime.cp", "write loss.shift=false"),
    ("runtime.ep=2", "'runtime.ep=2': runtime.ep", "(ep_plan); ep fits 1"),
    ("runtime.dp_shard=0", "'runtime.dp_shard=0'", "-1 for what the world size leaves"),
    (
        "launcher.nproc=2 runtime.dp_shard=3",
        "'runtime.dp_shard=3'",
        "needs 3 ranks but there are 2",
    ),
    (  # dp_shard=-1 is 2 with these ranks
        "launcher.nproc=4 runtime.pp=2 pipeline.schedule=InterleavedZeroBubble",
        ": runtime.dp_shard: ",
        "it fits runtime.dp_shard=1, and not 2",
    ),
    (
        "+experiment=full batching=padding_free launcher.nproc=2 runtime.pp=2",
        "'runtime.pp=2': runtime.pp",
        "write batching=packed, or runtime.pp=1",
    ),
    ("+runtime.train_timeout=-1", "'+runtime.train_timeout=-1'", "above 0, in seconds"),
    ("+runtime.init_timeout=0", "'+runtime.init_timeout=0'", "above 0, in seconds"),
    ("launcher.grace_seconds=-3", "'launcher.grace_seconds=-3'", "must not be negative"),
    ("data.validation_loader.epochs=0", "data.validation_loader.epochs", "above 0"),
    ("+experiment=lora adapter.config.r=0", "adapter.config.r: ", "at least 1"),
    ("+experiment=full model.dtype=bf16", "'model.dtype=bf16'", "write float32, bfloat16"),
    ("callbacks=ema callbacks.ema.decay=2", "callbacks.ema.decay", "below 1"),
    # files
    ("+experiment=full model.path=./nowhere", "model.path", "there is no folder nowhere"),
    ("data=text data.corpus.path=nowhere", "data.corpus.path", "expected a .txt or .jsonl file"),
    ("+experiment=twice", "twice.yaml", "duplicate key max_steps"),
    ("+experiment=open", "open.yaml", "line 3"),
    # the command itself
    ("+experiment=full data.path=[a,b]", "data.path=[a,b]", "'~data.path' '+data.path=[a,b]'"),
    ("max_steps", "'max_steps'", "write KEY=VALUE"),
    ("+experiment=hook", "hydra.callbacks.x._target_", "allow_targets=[shutil.copyfile]"),
    ("+experiment=logs", "hydra.job_logging.formatters.x.()", "'os.system' is refused"),
    ("+experiment=tab", "tab.yaml", "indent with spaces"),
    (
        "optimizer.optimizer.eps=-1",
        "optimizer.optimizer.eps",
        "'+optimizer.optimizer.eps=-1'|: +opt",
    ),
    (
        "+experiment=full batching.sampler={_target_:ditty_di.data.WeightedSampler,_partial_:true}",
        "batching.sampler._target_",
        "it needs 'weights', and its slot calls SamplerFactory",
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
            max_steps: ${helper}
            global_batch_size: ${oc.select:other,16}
            data: {loader: {micro_batch_size: 4}, validation_loader: {micro_batch_size: 2}}
            export: {dtype: bfloat16}
            """
        )
    )
    check = ["task=check", "task.rehearse=false"]
    for typed in ("+experiment=fine", "+experiment=fine adapter=none", "+experiment=flow_matching"):
        assert main([*check, *typed.split()]) == 0, capsys.readouterr().err
    assert main(["task=explain", "key=max_steps", "+experiment=steps"]) == 0, (
        "a look is not refused"
    )


def test_ranks_that_this_machine_would_start_by_itself_are_warned_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No error, for the run may be meant for another machine."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check = ["task=check", "task.rehearse=false", "experiment=pretrain"]
    assert main([*check, "runtime.dp_shard=3"]) == 0
    said = "warning: launcher.nproc=null is 1 rank on this machine: runtime: "
    assert f"{said}dp_replicate=1, dp_shard=3" in capsys.readouterr().out
    assert main(check) == 0 and "warning" not in capsys.readouterr().out
