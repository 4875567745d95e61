"""The object graph: identity, checking, resolving, provenance."""

from __future__ import annotations

import enum
import functools
import math
import pickle
import re
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Optional, Protocol, Union

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, ListConfig, OmegaConf

from ditty_di.config import (
    ABSENT,
    BuildError,
    ConfigError,
    Graph,
    Provenance,
    difference,
    flatten,
    provenance,
)
from ditty_di.config.policy import is_refused
from ditty_di.config.targets import TargetError
from ditty_di.protocols import early_checks

if TYPE_CHECKING:
    from nowhere import Unimportable

    from ditty_di.protocols import (
        DataLoader,
        DataLoaderFactory,
        Loss,
        OptimizerFactory,
        ParallelizeFn,
        WeightsFn,
    )

HERE = __name__
ROOT = Path(__file__).parents[1]
made: list[str] = []


class Thing:
    """Takes anything, remembers the order in which things were made."""

    def __init__(self, *args: Any, name: str = "", **kwargs: Any) -> None:
        self.args, self.kwargs, self.name = args, kwargs, name
        made.append(name)


class Point:
    def __init__(self, x: int, y: int = 0, *, scale: float = 1.0) -> None:
        self.x, self.y, self.scale = x, y, scale


class Explodes:
    """Must never be made."""

    def __init__(self, **kwargs: Any) -> None:
        raise AssertionError("was built")


class Trainer:
    """Slots as the real trainer has them, annotated with names that only a type checker sees."""

    def __init__(
        self,
        *,
        model: Unimportable,
        optimizer: OptimizerFactory | None = None,
        dataloader: DataLoader | DataLoaderFactory | None = None,
        parallelize_fn: ParallelizeFn | None = None,
        weights: Optional[WeightsFn] = None,  # noqa: UP045
        loss_fn: Union[Loss, None] = None,  # noqa: UP007
        hook: Callable[..., Any] | None = None,
        steps: int = 1,
    ) -> None:
        raise AssertionError("was built")


def sgd(params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
    raise AssertionError("was built")


def loader(dataset: Any, *, dp_rank: int, dp_world_size: int, batch_size: int = 1) -> None:
    raise AssertionError("was built")


def one_rank_loader(dataset: Any, rank: int) -> None:
    raise AssertionError("was built")


def shard(model: Any, *, parallel_dims: Any, reshard: bool = True) -> None:
    raise AssertionError("was built")


def fails(**kwargs: Any) -> None:
    raise FileNotFoundError("no such file: weights.bin")


def interrupted() -> None:
    raise KeyboardInterrupt


def scalars(
    steps: int = 1,
    rate: float | None = 0.1,
    flag: bool = False,
    either: int | str = 1,
    kind: Literal["a"] = "a",
    sloppy: int = "auto",  # type: ignore[assignment]
    text: str = "",
) -> None: ...


class Named:
    def __init__(self, eos_token_id: int, dropout1: float = 0.0, **rest: Any) -> None:
        raise AssertionError("was built")


def only(x: int, /, y: int) -> tuple[int, int]:
    return x, y


def node(target: str = "Thing", **keys: Any) -> dict[str, Any]:
    return {"_target_": f"{HERE}.{target}", **keys}


def build(cfg: dict[str, Any], key: str = "root") -> Any:
    made.clear()
    return Graph(OmegaConf.create(cfg)).build(key)


def problems(cfg: dict[str, Any], root: str = "root") -> list[str]:
    """What check says, without raising."""
    try:
        Graph(cfg).check(root)
    except ConfigError as error:
        return str(error).splitlines()
    return []


def raises(cfg: dict[str, Any], key: str = "root") -> str:
    with pytest.raises(ConfigError) as info:
        build(cfg, key)
    return str(info.value)


# --------------------------------------------------------------------------------------- identity
def test_a_reference_is_the_object() -> None:
    root = build({"tok": node(), "root": node(a="${tok}", b=["${tok}"], c={"d": node(e="${tok}")})})
    tok = root.kwargs["a"]
    assert root.kwargs["b"] == [tok]
    assert root.kwargs["c"]["d"].kwargs["e"] is tok
    assert len(made) == 3


def test_two_nodes_are_two_objects_and_two_graphs_share_nothing() -> None:
    cfg = OmegaConf.create({"a": node(), "b": node(), "both": ["${a}", "${b}", "${a}"]})
    graph = Graph(cfg)
    first, second, third = graph.build("both")
    assert first is third is graph.build("a") and first is not second
    assert Graph(cfg).build("a") is not first


def test_chains_and_relative_references_lead_to_one_object() -> None:
    cfg = {
        "a": node(),
        "b": "${a}",
        "c": {"x": "${b}", "y": "${.x}", "z": {"up": "${..x}", "list": ["${...y}", "${.0}"]}},
        "root": ["${c.x}", "${c.y}", "${c.z.up}", "${c.z.list[0]}", "${c.z.list.1}", "${ a }"],
    }
    assert len({id(o) for o in build(cfg)}) == 1
    assert len(made) == 1


def test_a_reference_into_a_node() -> None:
    """A scalar of it, a node inside it, and a position in it that is itself a reference."""
    cfg = {
        "tok": node(),
        "model": node(config=node(size=7, vocab="${tok}", inner=node())),
        "alias": "${model}",
        "root": node(
            size="${model.config.size}",
            vocab="${alias.config.vocab}",
            inner="${model.config.inner}",
            config="${model.config}",
            model="${alias}",
            named="${model._target_}",
        ),
    }
    given = build(cfg).kwargs
    assert given["size"] == 7 and given["named"] == f"{HERE}.Thing"
    assert given["config"] is given["model"].kwargs["config"]
    assert given["inner"] is given["config"].kwargs["inner"]
    assert given["vocab"] is given["config"].kwargs["vocab"]


def test_a_plain_tree_is_copied_and_the_nodes_in_it_are_shared() -> None:
    cfg = {
        "plain": {"n": node(), "l": [1, {"m": "${.n_}"}], "s": 2},
        "root": ["${plain}", "${plain}"],
    }
    cfg["plain"]["l"][1]["m"] = "${plain.n}"
    first, second = build(cfg)
    assert first == second and first is not second and first["l"] is not second["l"]
    assert first["n"] is second["n"] is first["l"][1]["m"]


def test_keys_with_dots_do_not_collide() -> None:
    root = build({"root": {"a.b": node(name="dotted"), "a": {"b": node(name="nested")}}})
    assert root["a.b"].name == "dotted" and root["a"]["b"].name == "nested"


def test_only_what_is_reached_is_built_or_resolved() -> None:
    cfg = {
        "broken": {"_target_": "no.such.module"},
        "lost": "${nowhere}",
        "missing": "???",
        "env": "${oc.env:DITTY_DI_NOT_SET}",
        "root": node(x=1),
    }
    assert build(cfg).kwargs == {"x": 1}


def test_arguments_are_built_in_the_order_written() -> None:
    build(
        {
            "late": node(name="late"),
            "root": node(
                b=node(name="b"),
                _args_=[node(name="args")],
                a="${late}",
                c={"x": node(name="x"), "y": [node(name="y")]},
                name="root",
            ),
        }
    )
    assert made == ["b", "args", "late", "x", "y", "root"]


def test_partials() -> None:
    cfg = {
        "inner": node(),
        "p": node("Point", _partial_=True, _args_=[1], scale=2.0),
        "q": node(_partial_=True, x="${inner}", y=node()),
        "root": ["${p}", "${p}", "${q}"],
    }
    p, again, q = build(cfg)
    assert type(p) is functools.partial and p is again and p.func is Point
    assert p(y=5).y == 5 and p().x == 1 and p().scale == 2.0
    made.clear()
    assert q().kwargs["y"] is q().kwargs["y"] and q().kwargs["x"] is q.keywords["x"]
    assert len(made) == 3  # the calls of q: what is in it was built with it


def test_args_and_falsy_values_arrive_as_written() -> None:
    root = build(
        {"list": [0, ""], "root": node(_args_="${list}", a=0, b=False, c=None, d={}, e=[])}
    )
    assert root.args == (0, "")
    assert root.kwargs == {"a": 0, "b": False, "c": None, "d": {}, "e": []}
    assert build({"root": node("only", _args_=[1], y=0)}) == (1, 0)


def test_values_from_live_objects() -> None:
    root = {"_target_": "builtins.len", "_args_": ["${words}"]}
    assert build({"words": {"_target_": "builtins.list", "_args_": ["abc"]}, "root": root}) == 3


def test_interpolations_in_text() -> None:
    cfg = {
        "run": "out/${name}",
        "name": "x${n}",
        "n": 3,
        "which": "b",
        "set": {"a": node(name="a"), "b": node(name="b")},
        "root": node(
            path="${run}/log", escaped=r"\${n}", slash=r"\\${n}", chosen="${set.${which}}"
        ),
    }
    given = build(cfg).kwargs
    assert given["path"] == "out/x3/log"
    assert (given["escaped"], given["slash"]) == ("${n}", "\\3")
    assert given["chosen"].name == "b"


def test_resolvers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITTY_DI_TEST", "12")
    cfg = {
        "n": {"a": node(name="a"), "b": node(name="b")},
        "root": {
            "env": "${oc.env:DITTY_DI_TEST}",
            "number": "${oc.decode:${oc.env:DITTY_DI_TEST}}",
            "default": "${oc.env:DITTY_DI_NOT_SET,null}",
            "all": "${oc.dict.values:n}",
            "one": "${oc.select:n.a}",
            "fresh": "${oc.create:{x: [1, 2]}}",
        },
        "again": ["${n.a}", "${n.b}"],
    }
    made.clear()
    graph = Graph(cfg)
    root = graph.build("root")
    assert (root["env"], root["number"], root["default"]) == ("12", 12, None)
    assert root["all"] == graph.build("again") and root["one"] is root["all"][0]
    assert root["fresh"] == {"x": [1, 2]} and type(root["fresh"]["x"]) is list
    assert made == ["a", "b"]


def test_resolvers_of_one_s_own() -> None:
    """They may be given a part of the configuration, and give containers with text to resolve."""
    OmegaConf.register_new_resolver("ditty_length", len, replace=True)
    OmegaConf.register_new_resolver(
        "ditty_tree", lambda: {"t": "a${n}", "o": "${obj}", "l": ("${n}",)}, replace=True
    )
    cfg = {
        "n": 3,
        "obj": node(),
        "root": node(length="${ditty_length:${list}}", tree="${ditty_tree:}", obj="${obj}"),
        "list": [1, 2],
    }
    given = build(cfg).kwargs
    assert given["length"] == 2
    assert given["tree"] == {"t": "a3", "o": given["obj"], "l": [3]}


def test_a_shipped_style_node_builds_the_same_under_hydra() -> None:
    from hydra.utils import instantiate

    cfg = OmegaConf.create(
        node("Point", x=3, scale=2.0) | {"y": {"_target_": "builtins.len", "_args_": ["abc"]}}
    )
    ours, theirs = Graph({"root": cfg}).build("root"), instantiate(cfg)
    assert vars(ours) == vars(theirs) == {"x": 3, "y": 3, "scale": 2.0}
    cfg._partial_ = True
    ours, theirs = Graph({"root": cfg}).build("root"), instantiate(cfg)
    assert (ours.func, ours.args, ours.keywords) == (theirs.func, theirs.args, theirs.keywords)


# ----------------------------------------------------------------------------- errors of building
def test_a_constructor_that_raises_names_the_node_and_keeps_the_cause() -> None:
    cfg = {"data": node("fails", path="x"), "root": node(inner={"d": "${data}"})}
    graph = Graph(cfg, lambda key: f"conf/x.yaml:{len(key)}")
    with pytest.raises(BuildError) as info:
        graph.build("root")
    text = str(info.value)
    assert text.startswith(f"conf/x.yaml:{len('data._target_')}: data: {HERE}.fails raised FileNot")
    assert "no such file: weights.bin" in text and "root -> data" in text
    assert isinstance(info.value.__cause__, FileNotFoundError)
    assert [p.key for p in info.value.problems] == ["data"]
    again = pickle.loads(pickle.dumps(info.value))
    assert str(again) == text and again.problems == info.value.problems


def test_a_failed_node_is_not_remembered_and_the_graph_goes_on() -> None:
    graph = Graph({"root": node("fails"), "ok": node()})
    for _ in range(2):
        with pytest.raises(BuildError):
            graph.build("root")
    assert isinstance(graph.build("ok"), Thing)


def test_an_interrupt_is_no_build_error() -> None:
    with pytest.raises(KeyboardInterrupt):
        build({"root": node("interrupted")})


@pytest.mark.parametrize(
    ("cfg", "trail"),
    [
        ({"root": node(x="${b}"), "b": node(x="${root}")}, "root -> b -> root"),
        ({"root": node(x="${root}")}, "root -> root"),
        ({"root": node(x=node(y="${root}"))}, "root -> root.x -> root"),
        ({"root": node(x="${p}"), "p": {"l": ["${root}"]}}, "root -> p -> root"),
        ({"root": {"x": "${b}"}, "b": {"y": "${root}"}}, "b -> root -> b"),
        ({"root": "${b}", "b": "${c}", "c": "${b}"}, "b -> c -> b"),
        ({"root": "${root.x}"}, "root -> root"),
        ({"root": "a${b}", "b": "c${root}"}, "root -> b -> root"),
        ({"root": node(x="${a}"), "a": node(p="${b}"), "b": node(_partial_=True, q="${a}")},
         "a -> b -> a"),
    ],
)  # fmt: skip
def test_cycles_are_named(cfg: dict[str, Any], trail: str) -> None:
    assert trail in raises(cfg)
    assert any("circular reference" in line for line in problems(cfg))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"root": "${modle.size}", "model": {"size": 1}}, "no 'modle'; did you mean 'model'"),
        (
            {"root": "${model.sise}", "model": {"size": 1}},
            "model has no 'sise'; did you mean 'size'",
        ),
        ({"root": "${size}", "model": {"deep": {"size": 1}}}, "did you mean 'model.deep.size'"),
        ({"root": {"path": "${m.path}"}, "m": {"a": 1}}, "m has no 'path'\n"),
        ({"root": "${m.path}", "m": {"a": {"path": 1}}}, "did you mean 'm.a.path'"),
        ({"root": "x${model.sise}", "model": {"size": 1}}, "did you mean 'size'"),
        ({"root": "${m.x}", "m": None}, "m has no 'x', it is None"),
        ({"root": "${m.3}", "m": [1]}, "m has no '3'"),
        ({"root": {"a": "${....b}"}}, "above the configuration's root"),
        ({"root": "x${m}", "m": {"a": 1}}, "mapping or list, 'm', inside a text"),
        ({"root": "${nosuch:1}"}, "cannot resolve '${nosuch:1}'"),
        ({"root": "${oc.env:DITTY_DI_NOT_SET}"}, "DITTY_DI_NOT_SET"),
        ({"root": {"lr": "???"}}, "root.lr: missing mandatory value (???); set root.lr=VALUE"),
        ({"root": "${opt.lr}", "opt": {"lr": "???"}}, "opt.lr: missing mandatory value"),
        ({"root": "x-${lr}", "lr": "???"}, "lr: missing mandatory value"),
        ({"other": 1}, "no such key: the configuration has no 'root'"),
    ],
)
def test_what_cannot_be_resolved(cfg: dict[str, Any], message: str) -> None:
    text = raises(cfg)
    assert message in f"{text}\n"
    if "root" in cfg:
        assert problems(cfg) == text.splitlines()


def test_an_unknown_key_is_an_error_of_what_was_asked_for() -> None:
    graph = Graph({"optimizer": {"lr": 1}})
    with pytest.raises(ConfigError, match=r"^optimizer\.lrr: .*did you mean 'lr'"):
        graph.build("optimizer.lrr")
    with pytest.raises(ConfigError, match="is not a key"):
        graph.build("")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"_target_": 3}, "root._target_: is 3: write a dotted path"),
        ({"_target_": "???"}, "root._target_: missing mandatory value"),
        ({"_partial_": "yes"}, "root._partial_: is 'yes': write true or false"),
        ({"_args_": 1}, "root._args_: is 1: write a list"),
        ({"_convert_": "none"}, "leave it out"),
        ({"_recursive_": False}, "leave it out"),
        ({1: 2}, "names are text"),
    ],
)
def test_special_keys(keys: dict[Any, Any], message: str) -> None:
    cfg = {"root": node() | keys}
    assert message in raises(cfg)
    assert problems(cfg) == raises(cfg).splitlines()


def test_special_keys_that_say_what_happens_anyway() -> None:
    assert build({"root": node(_convert_="all", _recursive_=True, _partial_=False, x=[1])})


# -------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    "target",
    [
        "os.system", "posix.system", "shutil.os.system", "os.execv", "os.spawnl", "os.popen",
        "os.remove", "os.environ.update", "logging.sys.modules.get", "subprocess.run",
        "subprocess.Popen", "builtins.eval", "builtins.exec", "builtins.compile",
        "builtins.__import__", "importlib.import_module", "pickle.loads", "_pickle.loads",
        "pty.spawn", "shutil.rmtree", "runpy.run_path", "ctypes.CDLL", "operator.attrgetter",
        "builtins.str.format", "functools.partial.__call__", "json.loads.__globals__.get",
        "HERE.alias", "HERE.in_partial",
        # load pickles or code
        "torch.hub.load", "torch.package.PackageImporter", "joblib.load", "dill.loads",
        "pandas.read_pickle", "torch.jit.load", "datasets.utils.py_utils.dumps",
        # start processes
        "torch.distributed.run.main", "torch.multiprocessing.spawn", "multiprocessing.Pool",
        "torch.utils.collect_env.run", "setuptools._distutils.spawn.spawn", "webbrowser.open",
        "torch.utils.cpp_extension.load_inline", "torch.distributed.launcher.api.elastic_launch",
        "ditty_di.launch.processes.Child", "ditty_di.launch.worker.main", "threading.Thread",
        "ditty_di.io.write_text", "ditty_di.checkpoint.folder.remove_leftovers",
        # evaluate text
        "torch.fx.graph_module._exec_with_source", "torch._inductor.codecache.PyCodeCache.load",
        "sympy.sympify", "sympy.parsing.sympy_parser.parse_expr", "sympy.lambdify",
        "jinja2.Template", "jinja2.Template.render", "pandas.eval", "pandas.DataFrame.eval",
        # write files
        "builtins.open", "io.open", "pathlib.Path.write_text", "pathlib.PosixPath.write_bytes",
        "pathlib.Path.open", "pathlib.Path.unlink", "pathlib.Path.rename", "shutil.copyfile",
        "sqlite3.connect", "numpy.save", "numpy.savez_compressed", "numpy.memmap", "torch.save",
        "safetensors.torch.save_file", "tempfile.NamedTemporaryFile", "zipfile.ZipFile",
        "logging.FileHandler", "omegaconf.OmegaConf.save", "gzip.open",
        "urllib.request.urlretrieve",
        "transformers.PreTrainedModel.push_to_hub", "transformers.LlamaConfig.save_pretrained",
        "huggingface_hub.delete_repo", "datasets.Dataset.to_json",
        # the same by other doors
        "torch.storage._load_from_bytes", "torch.distributed.checkpoint.load", "torch.from_file",
        "torch.distributed.distributed_c10d._tensor_to_object", "torch.FloatStorage.from_file",
        "torch._C._load_for_lite_interpreter", "torch.utils.hipify.hipify_python.hipify",
        "numpy.ctypeslib.load_library", "numpy.lib.format.open_memmap", "scipy.io.savemat",
        "pandas.read_sql", "pandas.read_hdf", "pandas.io.common.get_handle",
        "datasets.load.import_main_class", "datasets.utils.extract.Extractor.extract",
        "transformers.utils.import_utils.direct_transformers_import",
        "transformers.testing_utils.execute_subprocess_async", "huggingface_hub.login",
        "huggingface_hub.run_job", "huggingface_hub.move_repo", "huggingface_hub.HfApi",
        "multiprocess.Pool", "_thread.start_new_thread",
        "test.support.script_helper.assert_python_ok",
        "rlcompleter.Completer.attr_matches", "argparse.FileType", "types.LambdaType",
        "tkinter.Tcl", "http.client.HTTPSConnection", "mmap.mmap", "pstats.Stats",
    ],
)  # fmt: skip
def test_refused_targets(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(sys.modules[HERE], "alias", os.system, raising=False)
    monkeypatch.setattr(
        sys.modules[HERE], "in_partial", functools.partial(os.system, "true"), raising=False
    )
    cfg = {"root": {"_target_": target.replace("HERE", HERE), "_partial_": True}}
    assert "refused" in raises(cfg)
    assert "refused" in problems(cfg)[0]


@pytest.mark.parametrize(
    "args", [["${os}", "system"], ["${here}", "__globals__"], ["${here}", "__code__"]]
)
def test_a_node_cannot_fetch_what_is_refused(args: list[str]) -> None:
    cfg = {
        "os": {"_target_": f"{HERE}.operating_system"},
        "here": {"_target_": f"{HERE}.itself"},
        "root": {"_target_": "builtins.getattr", "_args_": args},
    }
    assert "refused" in raises(cfg)


class Moody:
    """Callable, and raises when it is asked for an attribute that it does not have."""

    def __call__(self) -> None: ...

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} today")


def test_any_callable_object_can_be_built() -> None:
    assert isinstance(build({"root": node("Moody")}), Moody)


def operating_system() -> types.SimpleNamespace:
    import os

    return types.SimpleNamespace(system=os.system)


def itself() -> Callable[..., Any]:
    return itself


def test_refuses_whatever_hydra_refuses() -> None:
    policy = pytest.importorskip("hydra._internal.target_policy")
    names = policy.DEFAULT_BLOCKLISTED_MODULES | policy.UNCONTROLLED_EXECUTION_TARGETS
    names |= {
        f"{p}x" if p.endswith(".") else p for p in policy.UNCONTROLLED_EXECUTION_TARGET_PREFIXES
    }
    assert sorted(name for name in names if not is_refused(name)) == []


@pytest.mark.parametrize(
    ("target", "arguments", "named"),
    [
        ("torch.load", {"f": "x", "weights_only": False}, "weights_only=False"),
        ("torch.load", {"f": "x", "weights_only": 0}, "weights_only=0"),
        ("torch.load", {"f": "x", "weights_only": "${no}"}, "weights_only=False"),
        ("numpy.load", {"file": "x", "allow_pickle": True}, "allow_pickle=True"),
        ("numpy.load", {"_args_": ["x", None, True]}, "allow_pickle=True"),
        ("datasets.load_dataset", {"path": "pandas", "data_files": "x"}, "path='pandas'"),
        (
            "transformers.AutoTokenizer.from_pretrained",
            {"_args_": ["x"], "trust_remote_code": True},
            "trust_remote_code=True",
        ),
    ],
)
def test_arguments_that_load_pickles_or_code_are_refused(target, arguments, named) -> None:
    for partial in (True, False):
        cfg = {"no": False, "root": {"_target_": target, "_partial_": partial, **arguments}}
        assert named in problems(cfg)[0]
        assert "allow_targets=[" in problems(cfg)[0]
        with pytest.raises(ConfigError, match=named):
            Graph(cfg).build("root")
        allowed = Graph(cfg, allow_targets=[target])
        allowed.check("root")
        if partial:
            assert callable(allowed.build("root"))


def test_functions_that_load_safely_are_not_refused() -> None:
    for target in ("torch.load", "numpy.load"):
        cfg = {"root": {"_target_": target, "_partial_": True, "_args_": ["x"]}}
        assert callable(build(cfg)) and problems(cfg) == []


def test_a_refused_target_is_allowed_by_its_name_alone() -> None:
    cfg = {"root": {"_target_": "shutil.copyfile", "_partial_": True}}
    assert callable(Graph(cfg, allow_targets=["shutil.copyfile"]).build("root"))
    for other in ("shutil", "copyfile", "shutil.rmtree"):
        with pytest.raises(ConfigError, match="refused"):
            Graph(cfg, allow_targets=[other]).build("root")
    hidden = {"root": {"_target_": "json.loads.__globals__.get", "_partial_": True}}
    with pytest.raises(ConfigError, match="refused"):
        Graph(hidden, allow_targets=["json.loads.__globals__.get"]).build("root")


def test_a_resolved_configuration_keeps_what_was_allowed(tmp_path: Path) -> None:
    cfg = {
        "allow_targets": ["shutil.copyfile"],
        "root": {"_target_": "shutil.copyfile", "_partial_": True},
    }
    Graph(cfg).save(tmp_path / "resolved.yaml")
    assert callable(Graph.load(tmp_path / "resolved.yaml").build("root"))


def test_functions_of_ones_own_may_do_what_they_want() -> None:
    """The remedy that the message names works: a function of the user's that evaluates text."""
    assert build({"root": node("evaluates", text="1 + 1")}) == 2


def evaluates(text: str) -> Any:
    return eval(text)


def test_shipped_targets_and_common_libraries_are_not_refused() -> None:
    files = {*(ROOT / "conf").rglob("*.yaml")} - {*(ROOT / "conf/hydra").rglob("*.yaml")}
    text = "\n".join(file.read_text() for file in files)  # Hydra builds its own parts itself
    shipped = set(re.findall(r"_target_: *([\w.]+)", text))
    optional = (
        *("liger_kernel", "bitsandbytes", "transformer_engine"),
        *("hydra_plugins", "datatrove"),
    )
    common = """
        torch.nn.Linear torch.optim.Adam torch.compile torch.utils.data.DataLoader torch.Generator
        torch.utils.data.TensorDataset torch.utils.data.random_split
        torch.optim.swa_utils.AveragedModel datasets.load_dataset datasets.Dataset.from_list
        datasets.Dataset.filter datasets.Dataset.map datasets.load_from_disk
        transformers.AutoConfig.from_pretrained pathlib.Path
        transformers.AutoModelForCausalLM.from_pretrained transformers.DataCollatorWithPadding
        peft.LoraConfig peft.get_peft_model tokenizers.Tokenizer.from_file json.loads re.compile
        numpy.array numpy.random.default_rng safetensors.torch.load_file pandas.read_csv
        sklearn.datasets.load_digits torch.utils.tensorboard.SummaryWriter builtins.range
        collections.OrderedDict itertools.chain random.Random datetime.timedelta logging.getLogger
        sklearn.datasets.fetch_openml sklearn.preprocessing.StandardScaler scipy.io.loadmat
        torch.profiler.profile torch.library.custom_op transformers.pipeline transformers.Trainer
        huggingface_hub.hf_hub_download huggingface_hub.snapshot_download numpy.loadtxt
        transformers.AutoModelForCausalLM.from_config peft.PeftModel.from_pretrained
        torch.distributed.init_process_group json.load csv.reader PIL.Image.open wandb.init
    """
    refused = []
    for target in sorted({*shipped, *common.split()}):
        if not target.startswith(optional):
            try:
                Graph({}).locate(target)
            except TargetError as error:
                refused.append(str(error))
    assert refused == []


def test_harmless_neighbours_are_not_refused() -> None:
    names = "os.path.join os.getenv os.environ.get builtins.len operator.mul functools.partial"
    for target in [*names.split(), "yaml.safe_load", "types.SimpleNamespace", "math.prod"]:
        cfg = {"root": {"_target_": target, "_partial_": True}}
        assert callable(build(cfg)) and problems(cfg) == []


# -------------------------------------------------------------------------------------- checking
def test_check_finds_everything_at_once_and_says_where() -> None:
    text = textwrap.dedent(
        f"""\
        opt:
          _target_: {HERE}.sgd
          _partial_: true
          weight_deacy: 0.1
        data:
          _target_: {HERE}.no_such
        size: ${{nowhere}}
        root:
          _target_: {HERE}.Trainer
          optimizer: ${{opt}}
          dataloader: ${{data}}
          steps: ${{size}}
          hook: ???
          stepz: 1
        unreached: {{_target_: no.such.thing}}
        """
    )
    graph = Graph(OmegaConf.create(text), Provenance().add_file("c.yaml", text))
    with pytest.raises(ConfigError) as info:
        graph.check("root")
    assert sorted(str(info.value).splitlines()) == sorted(
        [
            f"c.yaml:14: root.stepz: {HERE}.Trainer: 'stepz' is not a parameter of it; "
            "did you mean 'steps'?",
            f"c.yaml:9: root._target_: {HERE}.Trainer: it needs 'model'",
            f"c.yaml:4: opt.weight_deacy: {HERE}.sgd: 'weight_deacy' is not a parameter of it; "
            "did you mean 'weight_decay'?",
            f"c.yaml:6: data._target_: cannot find '{HERE}.no_such': module '{HERE}' "
            "has no attribute 'no_such'",
            "c.yaml:7: size: ${nowhere}: the configuration has no 'nowhere'",
            "c.yaml:13: root.hook: missing mandatory value (???); set root.hook=VALUE",
        ]
    )  # fmt: skip


def test_check_builds_nothing() -> None:
    cfg = {"a": node("Explodes"), "root": node("Explodes", x="${a}", y=node("Explodes"))}
    assert list(Graph(cfg).check("root").nodes) == ["root", "a", "root.y"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_such_package.thing", "no module 'no_such_package'"),
        ("jsn.loads", "no module 'jsn'; did you mean 'json'"),
        ("no_such_extra.thing", "'no_such_extra'; pip install 'ditty_di[fancy]'"),
        ("json.lods", "module 'json' has no attribute 'lods'; did you mean 'load"),
        ("json.decodr.JSONDecoder", "no attribute 'decodr'; did you mean 'decoder'"),
        (
            "json.JSONDecoder.decod",
            "'json.JSONDecoder' has no attribute 'decod'; did you mean 'decode'",
        ),
        ("json", "not a dotted path"),
        ("len", "did you mean 'builtins.len'"),
        ("json..loads", "not a dotted path"),
        ("json.decoder", "is a module, which cannot be called"),
        ("math.pi", "is a float, which cannot be called"),
        ("ditty_broken.thing", "'ditty_broken' needs the module 'not_installed_here'"),
        ("ditty_raises.thing", "importing 'ditty_raises' raised RuntimeError: no luck"),
        ("ditty_verb.run", "did you mean 'ditty_verb.run.run'?"),
    ],
)
def test_targets_that_cannot_be_imported(
    target: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ditty_broken.py").write_text("import not_installed_here\n")
    (tmp_path / "ditty_raises.py").write_text("raise RuntimeError('no luck')\n")
    (tmp_path / "ditty_di-9.dist-info").mkdir()
    (tmp_path / "ditty_di-9.dist-info/METADATA").write_text(
        "Name: ditty_di\nVersion: 9\nRequires-Dist: no_such_extra>=4; extra == 'fancy'\n"
    )
    (tmp_path / "ditty_verb").mkdir()
    (tmp_path / "ditty_verb" / "run.py").write_text("def run(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    cfg = {"root": {"_target_": target}}
    assert len(problems(cfg)) == 1 and message in problems(cfg)[0]
    assert message in raises(cfg)


@pytest.mark.parametrize(
    ("root", "messages"),
    [
        (node("Point"), ["it needs 'x'"]),
        (node("Point", x=1, Y=2), ["'Y' is not a parameter"]),
        (node("Point", _args_=[1, 2, 3]), ["takes 2 positional argument(s), and _args_ has 3"]),
        (node("Point", _args_=[1], x=2), ["'x' is given twice: here and by _args_"]),
        (node("Point", _args_=["${xs}"], y=1), []),
        (
            node("only", x=1, y=2),
            ["'x' is a positional-only parameter: give it in _args_"],
        ),
        (node("Point", _partial_=True), []),
        (node("Point", _partial_=True, skale=2), ["did you mean 'scale'"]),
        (node("Point", x=1, _partail_=True), ["did you mean '_partial_'"]),
        (node("Thing", nm="x", colour="red"), []),
        (node("Thing", name="x", namee="y"), ["'namee' looks like a misspelling"]),
        (node("Named", eos_token_id=1, bos_token_id=2, dropout2=0.1), []),
        (node("Thing", namee="x"), ["'namee' looks like a misspelling; did you mean 'name'"]),
        (node("Thing", name="x", _partail_=True), ["did you mean '_partial_'"]),
        ({"_target_": "builtins.dict", "anything": 1}, []),
    ],
)
def test_signatures_are_bound(root: dict[str, Any], messages: list[str]) -> None:
    found = problems({"xs": 1, "root": root})
    assert len(found) == len(messages)
    for line, message in zip(found, messages, strict=True):
        assert message in line


def test_an_unreadable_signature_is_only_imported() -> None:
    root = {"_target_": "builtins.max", "_args_": [1, 2]}
    assert Graph({"root": root}).check("root").unread == ["root"]


@pytest.mark.parametrize(
    ("slot", "given", "messages"),
    [
        ("optimizer", node("sgd", _partial_=True, lr=1.0), []),
        ("optimizer", node("sgd", _partial_=True, params=1),
         ["'params' is given twice: here and by its slot"]),
        ("optimizer", node("shard", _partial_=True),
         ["needs 'parallel_dims', and its slot calls OptimizerFactory (named_parameters)"]),
        ("optimizer", node("interrupted", _partial_=True),
         ["takes 0 positional argument(s), but its slot calls OptimizerFactory"]),
        ("optimizer", node("sgd", lr=1.0), ["needs 'params'; write _partial_: true"]),
        ("dataloader", node("loader", _partial_=True, dataset=1), []),
        ("dataloader", node("loader", _partial_=True),
         ["needs 'dataset', and its slot calls DataLoaderFactory (dp_rank=, dp_world_size=)"]),
        ("dataloader", node("loader", _partial_=True, dataset=1, dp_rank=0),
         ["'dp_rank' is given twice"]),
        ("dataloader", node("one_rank_loader", _partial_=True, dataset=1),
         ["has no parameter 'dp_rank', but its slot calls DataLoaderFactory",
          "has no parameter 'dp_world_size'", "needs 'rank'"]),
        ("dataloader", node("Explodes"), []),
        ("parallelize_fn", node("shard", _partial_=True, reshard=False), []),
        ("parallelize_fn", node("sgd", _partial_=True), ["no parameter 'parallel_dims'"]),
        ("weights", node("shard", _partial_=True),
         ["no parameter 'device'", "needs 'parallel_dims'"]),
        ("loss_fn", node("only", _partial_=True),
         ["takes 2 positional argument(s), but its slot calls Loss"]),
        ("hook", node("shard", _partial_=True, reshrd=1), ["did you mean 'reshard'"]),
        ("hook", node("shard", _partial_=True), []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("by_reference", [False, True])
def test_partials_are_bound_with_what_their_slot_gives(
    slot: str, given: dict[str, Any], messages: list[str], by_reference: bool
) -> None:
    root = node("Trainer", model=None, **{slot: "${given}" if by_reference else given})
    found = problems({"given": given, "root": root})
    assert len(found) == len(messages), found
    for line, message in zip(found, messages, strict=True):
        assert message in line
        assert line.startswith("given" if by_reference else f"root.{slot}")


def test_a_partial_in_two_slots_must_fit_both() -> None:
    both = node("shard", _partial_=True)
    root = node("Trainer", model=None, parallelize_fn="${s}", optimizer="${s}")
    found = problems({"s": both, "root": root})
    assert len(found) == 1 and "OptimizerFactory" in found[0]


class Twice(Protocol):
    def __call__(self, first: int, second: int, /) -> int: ...


class Once(Protocol):
    def __call__(self, *, only: int) -> int: ...


class Open(Protocol):
    def __call__(self, *args: Any, **kwargs: Any) -> int: ...


def test_slots_in_plain_annotations_and_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations that are objects, not text; a slot reached through `_args_`; a union of kinds."""

    def consumer(a: Any, b: Any = None, *rest: Any, c: Any = None) -> None: ...

    consumer.__annotations__ = {
        "a": Twice,
        "b": Optional[Once | Twice],  # noqa: UP045
        "rest": Twice,
        "c": Open | Twice | Once,
    }
    monkeypatch.setattr(sys.modules[HERE], "consumer", consumer, raising=False)
    bad, good = node("shard", _partial_=True), node("Point", _partial_=True)
    for args, count in (([good], 0), ([bad], 2), ([good, bad], 2), ([good, good, bad], 2)):
        assert len(problems({"root": node("consumer", _args_=args)})) == count
    assert len(problems({"root": node("consumer", a=bad)})) == 2
    assert problems({"root": node("consumer", a=good, b=good, c=good)}) == []
    assert Graph({"root": node("consumer", a=good)}).check("root").slots == {"root.a": "Twice"}


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("steps", "100", "is the text '100', and int is wanted: write it without quotes"),
        ("rate", "1e-4", "is the text '1e-4', and float is wanted: write it without quotes"),
        ("flag", "yes", "is the text 'yes', and bool is wanted"),
        ("steps", 1000.0, "is 1000.0, and int is wanted: write 1000"),
        ("steps", "${text}", "is the text '7', and int is wanted"),
        ("rate", 1, ""),
        ("rate", None, ""),
        ("steps", 0.5, "is 0.5, and int is wanted"),
        ("steps", True, "is true, and int is wanted"),
        ("steps", [1], "is a list, and int is wanted"),
        ("steps", None, "is null, and int is wanted"),
        ("text", {"a": 1}, "is a dict, and text is wanted"),
        ("either", "x", ""),
        ("kind", "b", ""),
        ("sloppy", "auto", ""),
        ("text", 3, ""),
    ],
)
def test_scalars_of_certainly_the_wrong_type(argument: str, value: Any, message: str) -> None:
    found = problems({"text": "7", "root": node("scalars", **{argument: value})})
    assert len(found) == bool(message)
    assert message in "".join(found)


def test_real_targets() -> None:
    """Typos in torch's and transformers' own constructors, one of them hiding **kwargs."""
    cfg = {
        "opt": {"_target_": "torch.optim.AdamW", "_partial_": True, "weight_deacy": 0.1},
        "config": {"_target_": "transformers.LlamaConfig", "hiden_size": 8, "num_hidden_layer": 2,
                   "hidden_size": 8, "attn_implementation": "sdpa", "vocab_size": 32},
        "root": node("Trainer", model="${config}", optimizer="${opt}"),
    }  # fmt: skip
    found = problems(cfg)
    assert [line.partition(":")[0] for line in found] == [
        "config.hiden_size", "config.num_hidden_layer", "opt.weight_deacy",
    ]  # fmt: skip
    assert "did you mean 'hidden_size'" in found[0] and "did you mean 'weight_decay'" in found[2]


# -------------------------------------------------------------------------- resolved, and back
class Colour(enum.Enum):
    red = 1


def test_resolve_keeps_identity_and_settles_scalars() -> None:
    cfg = {
        "lr": 0.1,
        "tok": node(),
        "alias": "${tok}",
        "plain": {"a": "${lr}", "b": ["x${lr}"]},
        "holds": {"t": "${tok}", "n": {"m": 1}},
        "model": node(tok="${alias}", size="${.deep.size}", deep={"size": 3, "up": "${..tok}"}),
        "root": node(
            lr="${lr}", size="${model.deep.size}", tok="${model.tok}", plain="${plain}",
            holds="${holds}", inner="${holds.n}", escaped=r"\${lr}",
        ),
        "unreached": {"lost": "${no.where}", "missing": "???", "env": "${oc.env:DITTY_DI_NOT_SET}"},
    }  # fmt: skip
    resolved = Graph(cfg).resolve()
    assert resolved["root"] == node(
        lr=0.1, size=3, tok="${tok}", plain={"a": 0.1, "b": ["x0.1"]},
        holds="${holds}", inner={"m": 1}, escaped=r"\${lr}",
    )  # fmt: skip
    assert resolved["alias"] == "${tok}" and resolved["model"]["deep"] == {
        "size": 3,
        "up": "${tok}",
    }
    assert resolved["unreached"] == cfg["unreached"]


def test_resolve_passes_over_what_refers_to_itself() -> None:
    cfg = {"a": {"x": "${b}"}, "b": {"y": "${a}"}, "c": "${c}", "d": "${a}", "ok": "${n}", "n": 1}
    assert Graph(cfg).resolve() == cfg | {"ok": 1}


def test_saved_yaml_is_plain_and_loads_to_the_same(tmp_path: Path) -> None:
    cfg = OmegaConf.create(
        {
            "texts": [
                "1e-4",
                "yes",
                "0x1",
                "",
                "???x",
                r"a\${b}",
                r"\\\${c}",
                "x: y",
                "2020-01-01",
            ],
            "numbers": [1e-5, math.inf, -0.0, 10**30, True, None],
            "enum": Colour.red,
            "path": Path("a/b"),
            "root": node(t="${texts}", n="${numbers}", e="${enum}"),
        }
    )
    Graph(cfg).save(tmp_path / "resolved.yaml")
    text = (tmp_path / "resolved.yaml").read_text()
    assert "!!" not in text and "python" not in text
    yaml.safe_load(text)
    before, after = Graph(cfg).build("root"), Graph.load(tmp_path / "resolved.yaml").build("root")
    assert after.kwargs == before.kwargs | {"e": "red"}


def test_load_says_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "resolved.yaml"
    with pytest.raises(ConfigError, match=r"cannot read .*No such file"):
        Graph.load(path)
    for text in ("a: [", "- 1", "a: ${b"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"cannot read .*resolved\.yaml"):
            Graph.load(path)
    path.write_text("a: 1\nb: {_target_: builtins.no_such}\n")
    with pytest.raises(ConfigError, match=r"resolved\.yaml:2: b\._target_"):
        Graph.load(path).check("b")


# other processes may be busy on this machine
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
words = st.text(alphabet="ab${}\\.: '\"[]#\n\t-é0", max_size=8)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Any]:
    """Configurations of nodes n0, n1, ... whose arguments are scalars, containers, nodes, and
    references to earlier nodes and to what is inside them; `root` reaches all."""
    cfg: dict[str, Any] = {}
    references: list[str] = []
    count = 0

    def value(depth: int) -> Any:
        nonlocal count
        kind = draw(st.sampled_from(["leaf", "reference", "reference", "list", "dict", "node"]))
        if kind == "reference" and references:
            return draw(st.sampled_from(references))
        if depth and kind == "list":
            return [value(depth - 1) for _ in range(draw(st.integers(0, 2)))]
        if depth and kind == "dict":
            return {f"k{n}": value(depth - 1) for n in range(draw(st.integers(0, 2)))}
        if depth and kind == "node":
            count += 1
            name = f"inline{count}"
            given = {f"a{n}": value(depth - 1) for n in range(draw(st.integers(0, 2)))}
            return node(name=name, **given)
        leaf = draw(leaves)
        if isinstance(leaf, str):  # as it must be written to mean that text
            leaf = leaf.replace("\\", "/").replace("${", r"\${") if "${" in leaf else leaf
        return leaf

    for n in range(draw(st.integers(1, 6))):
        cfg[f"n{n}"] = node(name=f"n{n}", a=value(2), b=value(2))
        inside = cfg[f"n{n}"]
        references += [f"${{n{n}}}", f"${{n{n}.a}}", f"${{n{n}.b}}"]
        if isinstance(inside["a"], list) and inside["a"]:
            references.append(f"${{n{n}.a[0]}}")
    cfg["root"] = node(name="root", all=[f"${{n{n}}}" for n in range(len(cfg))])
    return cfg


def shape(value: Any, seen: dict[int, int]) -> Any:
    """What an object graph looks like: equal for equal structure, values and sharing."""
    assert not isinstance(value, DictConfig | ListConfig)
    if isinstance(value, Thing):
        if id(value) in seen:
            return seen[id(value)]
        seen[id(value)] = len(seen)
        return ["Thing", value.name, shape(value.kwargs, seen)]
    if type(value) is dict:
        return {key: shape(inner, seen) for key, inner in value.items()}
    if type(value) is list:
        return [shape(inner, seen) for inner in value]
    assert type(value) in (type(None), bool, int, float, str)
    return [type(value).__name__, repr(value)]


def count_nodes(value: Any) -> int:
    if isinstance(value, dict):
        return ("_target_" in value) + sum(map(count_nodes, value.values()))
    return sum(map(count_nodes, value)) if isinstance(value, list) else 0


@patient
@given(cfg=graphs())
def test_any_graph_is_built_once_per_node_from_plain_types(cfg: dict[str, Any]) -> None:
    made.clear()
    graph = Graph(OmegaConf.create(cfg))
    checked = graph.check("root")
    assert made == []
    root = graph.build("root")
    shape(root, {})
    assert sorted(made) == sorted(set(made))
    assert len(made) == count_nodes(cfg) == len(checked.nodes) == len(graph.nodes("root"))


@patient
@given(cfg=graphs())
def test_any_graph_survives_resolving_saving_and_loading(
    cfg: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run") / "resolved.yaml"
    graph = Graph(OmegaConf.create(cfg))
    graph.save(path)
    loaded = Graph.load(path)
    assert shape(loaded.build("root"), {}) == shape(graph.build("root"), {})
    assert loaded.resolve() == graph.resolve()
    assert difference(loaded.resolve(), graph.resolve()) == []


# -------------------------------------------------------------------------- comparing and reading
def test_flatten_and_difference() -> None:
    old = {"a": {"b": 1, "c": [1, {"d": 2}]}, "e": {}, "n": math.nan, "run": "x", "runs": 1}
    new = {"a": {"b": 2, "c": [1]}, "e": {}, "n": math.nan, "run": "y", "runs": 2, "f": []}
    assert flatten(old) == {
        "a.b": 1, "a.c.0": 1, "a.c.1.d": 2, "e": {}, "n": old["n"], "run": "x", "runs": 1,
    }  # fmt: skip
    assert difference(old, new, ignore=["run"]) == [
        ("a.b", 1, 2), ("a.c.1.d", 2, ABSENT), ("runs", 1, 2), ("f", ABSENT, []),
    ]  # fmt: skip
    assert difference(old, new, ignore=["a", "run", "runs"], only={"a.b", "f"}) == [
        ("f", ABSENT, [])
    ]
    assert [str(d) for d in difference({}, {"a": "x"})] == ["a: (not set) -> 'x'"]
    cfg = OmegaConf.create({"a": "${b}", "b": 1})
    assert flatten(cfg) == {"a": "${b}", "b": 1}


def test_reads_what_the_root_depends_on() -> None:
    cfg = {
        "seed": 1,
        "name": "x",
        "idle": {"lr": 1},
        "lost": "${nowhere}",
        "opt": node(lr="${rate}", tag="${name}-1"),
        "rate": "${base.lr}",
        "base": {"lr": 1, "other": 2},
        "root": node(opt="${opt}", seed="${seed}", lost="${lost}", all="${oc.dict.values:base}"),
    }
    reads = Graph(cfg).reads("root")
    assert {"seed", "name", "rate", "base.lr", "base.other", "opt.lr", "root.lost"} <= reads
    assert not any(key.startswith("idle") for key in reads)


def test_nodes_and_shared() -> None:
    cfg = {
        "tok": node(),
        "plain": {"list": ["${tok}"]},
        "root": node("Nowhere", a=node(t="${tok}"), p="${plain}", _args_=["${tok}"]),
    }
    graph = Graph(cfg)
    assert graph.nodes("root")["root"].arguments == [
        ("a", "root.a"), ("p.list.0", "tok"), ("_args_.0", "tok"),
    ]  # fmt: skip
    assert graph.shared("root") == {"tok": ["root.p.list.0", "root._args_.0", "root.a.t"]}


# -------------------------------------------------------------------------------------- provenance
@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {
        "conf/config.yaml": """\
            defaults:
              - opt: adam
              - db@data.source: disk
              - _self_
            lr: 1
            trainer:
              steps: 10
              betas: [1, 2, 3]
            base: &base {x: 1}
            merged:
              <<: *base
            """,
        "conf/opt/adam.yaml": "name: adam\nlr: 0.1\n",
        "conf/opt/sgd.yaml": "# a comment\nname: sgd\nlr: 0.2\n",
        "conf/db/disk.yaml": "path: /x\n",
        "conf/experiment/big.yaml": """\
            # @package _global_
            defaults:
              - override /opt: sgd
            trainer:
              steps: 20
              betas: [7]
            opt: {lr: 0.5}
            """,
        "mine/opt/lion.yaml": "name: lion\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def traced(conf: Path, *overrides: str) -> Provenance:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf / "conf"), version_base="1.3"):
        config = compose("config", list(overrides))
        found = provenance("config", list(overrides))
    for key in flatten(config):  # every key of the composed configuration has its own line
        assert found.history(key), key
    return found


def test_provenance_of_files_and_packages(conf: Path) -> None:
    where = traced(conf)
    assert where("lr") == "conf/config.yaml:5"
    assert where("trainer.betas.1") == "conf/config.yaml:8"
    assert where("opt.lr") == "conf/opt/adam.yaml:2"
    assert where("opt") == "conf/opt/adam.yaml:1"
    assert where("data.source.path") == "conf/db/disk.yaml:1"
    assert where("merged.x") == "conf/config.yaml:9"
    assert where("trainer.no_such_key") == where("trainer") == "conf/config.yaml:6"
    assert where("nothing") == "" == where("defaults")


def test_provenance_of_experiments_and_overrides(conf: Path) -> None:
    where = traced(
        conf, "+experiment=big", "trainer.steps=30", "+trainer.new={a: 1}", "++lr=3", "~base.x"
    )
    assert where("trainer.steps") == "command line 'trainer.steps=30'"
    assert where("trainer.new.a") == "command line '+trainer.new={a: 1}'"
    assert where("lr") == "command line '++lr=3'"
    assert where("base.x") == "command line '~base.x'"
    assert where("trainer.betas.2") == "conf/experiment/big.yaml:6"  # the list was replaced whole
    assert [(s.where, s.value, s.chosen_by) for s in where.history("trainer.steps")] == [
        ("conf/config.yaml:7", "10", ""),
        ("conf/experiment/big.yaml:5", "20", "command line '+experiment=big'"),
        ("command line 'trainer.steps=30'", "30", ""),
    ]
    assert [(s.where, s.value, s.chosen_by) for s in where.history("opt.lr")] == [
        ("conf/opt/sgd.yaml:3", "0.2", "conf/experiment/big.yaml"),
        ("conf/experiment/big.yaml:7", "0.5", "command line '+experiment=big'"),
    ]


def test_provenance_of_groups_from_other_folders(conf: Path) -> None:
    where = traced(conf, f"hydra.searchpath=[file://{conf}/mine]", "opt=lion", "+opt@second=sgd")
    assert where("opt.name") == "mine/opt/lion.yaml:1"
    assert where("second.lr") == "conf/opt/sgd.yaml:3"
    assert where.history("opt.name")[0].chosen_by == "command line 'opt=lion'"
    assert where.history("second.name")[0].chosen_by == "command line '+opt@second=sgd'"


# ----------------------------------------------------------------------------------- light imports
def test_importing_and_using_a_graph_needs_neither_torch_nor_hydra() -> None:
    code = """
import sys
from ditty_di.config import Graph
graph = Graph({"a": {"_target_": "types.SimpleNamespace", "x": "${b}"}, "b": 1})
graph.check("a"); graph.nodes("a"); graph.resolve(); assert graph.build("a").x == 1
import ditty_di.tasks.inspect
print([name for name in ("torch", "hydra", "transformers", "numpy") if name in sys.modules])
"""
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout.strip() == "[]"


# ------------------------------------------------------------------- a target's own early checks
class Rows:
    """Finds its own mistakes: `validate` without building, `rehearse` with a part of it."""

    def __init__(
        self, path: str = "rows", size: int = 4, *, kinds: Any = (), limit: int = 9
    ) -> None:
        self.validate(size=size, limit=limit)
        self.path, self.size, self.kinds = path, size, kinds
        made.append("rows")

    @staticmethod
    def validate(*, size: int = 1, limit: int = 9, kinds: Any = ()) -> None:
        wrong = []
        if size < 1 or size > limit:
            wrong.append(f"size={size}: write 1 to {limit}")
        for n, kind in enumerate(kinds):
            if kind.target is Point and kind.arguments.get("x", 0) < 0:
                wrong.append(f"kinds.{n}.x={kind.arguments['x']}: must not be negative")
        if wrong:
            raise ValueError("\n".join(wrong))

    @staticmethod
    def rehearse(build: Callable[[str], Any]) -> list[str]:
        path, kinds = build("path"), build("kinds")
        if not path.endswith("s"):
            raise ValueError(f"path={path}: there are no such rows")
        return [f"{len(kinds)} kinds, the first of scale {kinds[0].scale}"] if kinds else []


class HasMethods:
    """Its `validate` is an ordinary method and its `rehearse` is no check: neither is called."""

    def __init__(self, x: int = -1) -> None: ...

    def validate(self, x: int = 0) -> None:
        raise AssertionError("was called")

    rehearse = None


@early_checks(validate=lambda *, n=None: None if n is None or n > 0 else _refuse(f"n={n}: too few"))
def counted(model: Any, n: int = 1) -> Any:
    raise AssertionError("was built")


def _refuse(message: str) -> None:
    raise ValueError(message)


def early(text: str) -> Graph:
    return Graph(OmegaConf.create(text), Provenance().add_file("a.yaml", textwrap.dedent(text)))


def test_targets_find_their_own_mistakes_where_they_were_written() -> None:
    graph = early(
        f"""\
        size: 20
        top: {{_target_: {HERE}.Thing, rows: "${{rows}}", part: "${{part}}", fine: "${{fine}}"}}
        rows:
          _target_: {HERE}.Rows
          size: ${{size}}
          kinds:
            - _target_: {HERE}.Point
              _args_: [3]
            - ${{point}}
        point: {{_target_: {HERE}.Point, x: -2, yy: 1}}
        part:
          _target_: {HERE}.counted
          _partial_: true
          n: 0
        fine: {{_target_: {HERE}.HasMethods}}
        """
    )
    with pytest.raises(ConfigError) as found:
        graph.check("top")
    assert [str(p).replace(HERE, "here") for p in found.value.problems] == [
        "a.yaml:10: point.yy: here.Point: 'yy' is not a parameter of it; did you mean 'y'?",
        "a.yaml:1: size: here.Rows: size=20: write 1 to 9 (given to rows.size)",
        "a.yaml:10: point.x: here.Rows: kinds.1.x=-2: must not be negative",
        "a.yaml:14: part.n: here.counted: n=0: too few",
    ]


def test_defaults_and_positional_arguments_are_known_to_validate() -> None:
    seen: dict[str, Any] = {}

    class Sees:
        def __init__(self, a: int, b: Any = (1, 2), c: Any = Thing, *, d: int = 3) -> None: ...

        @staticmethod
        def validate(*, a: Any = "-", b: Any = "-", c: Any = "-", d: Any = "-") -> None:
            seen.update(a=a, b=b, c=c, d=d)

    globals()["Sees"] = Sees
    Graph({"x": {"_target_": f"{HERE}.Sees", "_args_": [7]}}).check("x")
    assert seen == {"a": 7, "b": (1, 2), "c": "-", "d": 3}
    with pytest.raises(
        ConfigError, match="circular reference"
    ):  # and no endless look at the arguments
        Graph({"x": {"_target_": f"{HERE}.Sees", "a": 1, "b": ["${x}"]}}).check("x")


def test_a_validate_that_fails_by_itself_is_reported_as_a_problem() -> None:
    cfg = {"x": {"_target_": f"{HERE}.Rows", "kinds": 5}, "y": "${x}"}
    with pytest.raises(ConfigError, match=r"x: .*Rows: TypeError"):
        Graph(cfg).check("y")


def test_a_rehearsal_builds_through_the_graph_and_warns() -> None:
    cfg = {
        "rows": {"_target_": f"{HERE}.Rows", "kinds": ["${point}"]},
        "point": {"_target_": f"{HERE}.Point", "x": 1, "scale": 2.0},
        "top": {"_target_": f"{HERE}.Thing", "rows": "${rows}"},
    }
    graph = Graph(cfg)
    made.clear()
    assert graph.rehearse("top") == ["rows: 1 kinds, the first of scale 2.0"]
    assert made == []  # neither the node itself nor who is given it
    assert graph.build("rows").kinds[0] is graph.build("point")

    cfg["rows"]["path"] = "row"
    with pytest.raises(ConfigError, match=r"^rows\.path: .*Rows: path=row: there are no such rows"):
        Graph(cfg).rehearse("top")
    cfg["rows"]["path"] = {"_target_": f"{HERE}.Explodes"}
    with pytest.raises(ConfigError, match=r"rows\.path: .*Explodes raised AssertionError"):
        Graph(cfg).rehearse("top")


class Polygon:
    """Says before it is built why it cannot be, and when it is."""

    def __init__(self, *, sides: int) -> None:
        if sides < 3:
            raise ValueError(f"sides={sides}: write at least 3")

    @staticmethod
    def rehearse(build: Callable[[str], Any]) -> list[str]:
        Polygon(sides=build("sides"))
        return []


class Drawing:
    def __init__(self, *, shape: Any) -> None:
        self.shape = shape

    @staticmethod
    def rehearse(build: Callable[[str], Any]) -> list[str]:
        build("shape")
        return []


def test_a_node_that_another_cannot_build_says_why_once() -> None:
    shape = {"_target_": f"{HERE}.Polygon", "sides": 2}
    drawing = {"_target_": f"{HERE}.Drawing", "shape": "${shape}"}
    with pytest.raises(ConfigError) as error:
        Graph({"shape": shape, "drawing": drawing}).rehearse("drawing")
    (problem,) = error.value.problems
    assert str(problem).endswith("Polygon: sides=2: write at least 3")


class Silent:
    """Cannot be built, and does not say why."""

    def __init__(self) -> None:
        raise ValueError


def test_a_cause_without_words_hides_no_other_problem() -> None:
    wordless = {"_target_": f"{HERE}.Drawing", "shape": {"_target_": f"{HERE}.Silent"}}
    nodes = {"_target_": f"{HERE}.Polygon", "sides": 2}, wordless
    with pytest.raises(ConfigError) as error:
        Graph({"all": list(nodes)}).rehearse("all")
    assert [problem.key for problem in error.value.problems] == ["all.0.sides", "all.1.shape"]
