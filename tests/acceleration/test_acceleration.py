"""Every fast path gives the plain model's result; what cannot work is left out with its reason, or refused if it was asked for.

Tolerances are relative, ||fast - plain|| / ||plain||, float32: 1e-5 for a whole U-Net's output and gradient (seen 1e-6).
"""

from __future__ import annotations

import json
import warnings

import launching
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from launching import ROOT
from small_model import small_family, small_unet

from prdp_fast.acceleration import attention, process
from prdp_fast.acceleration import choose as acceleration
from prdp_fast.acceleration.choose import Denoisers, Ranks, accelerate
from prdp_fast.acceleration.compile import CompiledForward, compile_trained, own_forward, uncompile
from prdp_fast.acceleration.cuda_graph import CudaGraphForward
from prdp_fast.acceleration.probe import Decision, Probe, Unsuitable, choose_variant, distance, fastest
from prdp_fast.config.recipe import PerformanceSettings
from prdp_fast.core.errors import UserError

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TOLERANCE = 1e-5
ROWS = 3
ALONE = Ranks()


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """aot_eager captures and partitions as the real compiler does, without compiling."""
    monkeypatch.setattr("prdp_fast.acceleration.compile.BACKEND", "aot_eager")
    torch._dynamo.reset()


def probe_of(denoiser, *, gradients: bool = True, rows: int = ROWS) -> Probe:
    return Probe(denoiser, small_family(), rows, CPU, torch.float32, gradients)


def outputs(denoiser, *, gradients: bool = True, call=None, rows: int = ROWS) -> list[torch.Tensor]:
    probe = probe_of(denoiser, gradients=gradients, rows=rows)
    return probe.run(probe.inputs(), call)


def choose(denoiser, reference=None, *, ranks=ALONE, remembered=None, **performance):
    return accelerate(
        Denoisers(denoiser, None, reference), PerformanceSettings(**performance), small_family(), train_rows=ROWS,
        sample_rows=ROWS, stage=2, device=CPU, dtype=torch.float32, ranks=ranks, remembered=remembered,
    )  # fmt: skip


@pytest.fixture
def no_compiler(monkeypatch):
    """What is compiled runs as it is: for the choices around it."""
    monkeypatch.setattr(torch, "compile", lambda forward, **options: forward)


@pytest.fixture
def planned(monkeypatch):
    """Compile on this CPU as `auto` does on CUDA."""
    as_on_cuda = acceleration.plan_compiling
    cuda = torch.device("cuda")
    monkeypatch.setattr(acceleration, "plan_compiling", lambda setting, device, *rest: as_on_cuda(setting, cuda, *rest))


# ------------------------------------------------------------------------------------------------------------------ attention
def test_a_unet_of_diffusers_does_not_listen_to_its_own_switch():
    """Why the project has a processor: should this fail one day, diffusers' own will do."""
    denoiser = small_unet()
    denoiser.set_attention_backend("_native_math")
    assert not any(hasattr(layer.processor, "_attention_backend") for layer in attention.attention_layers(denoiser))
    denoiser.set_attention_backend("native")


@pytest.mark.parametrize("name", ["sdpa", "math"])
@pytest.mark.parametrize("fused", [False, True])
def test_attention_is_the_same_by_every_kernel(name, fused):
    denoiser = small_unet()
    plain = outputs(denoiser)
    if fused:
        attention.fuse_qkv(denoiser)
    attention.set_attention(denoiser, name)
    kinds = {type(layer.processor) for layer in attention.attention_layers(denoiser)}
    assert kinds == {AttnProcessor2_0 if (name, fused) == ("sdpa", False) else attention.DispatchedAttention}
    fast = outputs(denoiser)
    assert distance(fast[:1], plain[:1]) < TOLERANCE
    if not fused:
        assert distance(fast[1:], plain[1:]) < TOLERANCE


def test_a_compiler_sees_through_math():
    """Torch's own kernel is opaque to it; so is the dispatcher's, which asks for the math kernel while it runs."""
    seen: dict[str, set[str]] = {}

    def record(graph, example_inputs):
        seen[name] |= {str(node.target) for node in graph.graph.nodes}
        return graph

    for name in ("sdpa", "math"):
        seen[name] = set()
        denoiser = small_unet()
        attention.set_attention(denoiser, name)
        layer = next(attention.attention_layers(denoiser))
        torch._dynamo.reset()
        torch.compile(layer.forward, backend=record)(torch.randn(ROWS, 9, layer.to_q.in_features))
    assert any("scaled_dot_product" in target for target in seen["sdpa"])
    assert not any("scaled_dot_product" in target for target in seen["math"]) and seen["math"]


def test_fusing_reads_copies_and_can_be_undone():
    denoiser = small_unet().requires_grad_(False)
    names = list(denoiser.state_dict())
    attention.fuse_qkv(denoiser)
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    used = [layer for layer in attention.attention_layers(denoiser) if layer.fused_projections]
    assert used
    attention.unfuse_qkv(denoiser, forget=True)
    assert list(denoiser.state_dict()) == names


def test_layers_with_more_than_projections_keep_the_whole_arithmetic():
    """An attention mask, and the four-dimensional input of the VAE's kind of layer, go the way of diffusers."""
    denoiser = small_unet()
    probe = probe_of(denoiser, gradients=False)
    inputs = probe.inputs() | {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0]] * ROWS)}
    plain = probe.run(inputs)
    attention.set_attention(denoiser, "math")
    assert distance(probe.run(inputs), plain) < TOLERANCE
    assert distance(plain, outputs(denoiser, gradients=False)) > 1e-3


def test_the_fastest_kernel_that_is_right_is_taken(monkeypatch):
    denoiser = small_unet()
    monkeypatch.setattr(Probe, "time", lambda self, calls: {name: 10.0 if name == "sdpa" else 7.0 for name in calls})
    decision = choose(denoiser).decisions["attention"]
    assert (decision.value, decision.milliseconds) == ("math", {"sdpa": 10.0, "math": 7.0})
    assert "math 7.0 ms" in str(decision)
    monkeypatch.setattr(Probe, "time", lambda self, calls: {name: 10.0 if name == "sdpa" else 9.5 for name in calls})
    assert choose(denoiser).decisions["attention"].value == "sdpa", "left a default for a difference that noise makes"


def test_a_kernel_that_fails_or_is_wrong_is_not_taken(monkeypatch):
    denoiser = small_unet()
    real = attention.DispatchedAttention.__call__
    for wrong, words in (
        (lambda self, *args, **kwargs: real(self, *args, **kwargs) * 1.01, "Unsuitable: its output is off by"),
        (lambda self, *args, **kwargs: 1 / 0, "ZeroDivisionError"),
    ):
        monkeypatch.setattr(attention.DispatchedAttention, "__call__", wrong)
        decision = choose(denoiser).decisions["attention"]
        assert decision.value == "sdpa"
        assert f"no math: {words}" in decision.reason
    with pytest.raises(UserError, match=r"performance\.attention flash.*CUDA.*set auto or sdpa|needs a CUDA device; set auto"):
        choose(denoiser, attention="flash")


def test_a_resumed_run_keeps_what_it_chose(monkeypatch):
    monkeypatch.setattr(Probe, "time", lambda self, calls: pytest.fail("measured again"))
    past = {"attention": {"value": "math"}, "fuse_qkv": {"value": "on"}}
    decisions = choose(small_unet(), small_unet().requires_grad_(False), remembered=past).decisions
    assert [decisions[name].value for name in past] == ["math", "on"]
    assert decisions["attention"].reason == "as this run chose when it started"


def test_rank_zero_chooses_for_all():
    told = Decision("math", "faster there")
    denoiser = small_unet()
    # Another rank: what it hears first is what rank 0 remembers, and then what rank 0 decides.
    off = Decision("off", "slower there")
    answers = iter([[None, None], [(told, None), (None, None)], *[[(off, None), (None, None)]] * 2])
    speed = choose(denoiser, ranks=Ranks(1, lambda value: next(answers, [value, value])), compile="off")
    assert speed.decisions["attention"] == told and speed.decisions["channels_last"] == speed.decisions["shared_halves"] == off
    assert all(isinstance(layer.processor, attention.DispatchedAttention) for layer in attention.attention_layers(denoiser))
    with pytest.raises(UserError, match="its line"):
        Ranks(1, lambda value: [(None, "its line"), value]).first(lambda: told)
    # Rank 0 compiles first; a fault of any rank is every rank's.
    order: list[str] = []
    assert Ranks(0, lambda value: [value, "theirs"]).in_turn(lambda: order.append("ran")) == "theirs"
    assert Ranks(1, lambda value: ["theirs", value]).in_turn(lambda: order.append("ran too")) == "theirs"
    assert order == ["ran"]


# ------------------------------------------------------------------------------------------------------------------ compiling
@pytest.mark.parametrize("mode", ["blocks", "full"])
def test_compiled_in_place(mode):
    denoiser = small_unet()
    names, plain = list(denoiser.state_dict()), outputs(denoiser)
    inputs = probe_of(denoiser).inputs()
    compile_trained(denoiser, mode, small_family().repeated_blocks, [ROWS])
    fast = outputs(denoiser)
    assert distance(fast[:1], plain[:1]) < TOLERANCE
    assert distance(fast[1:], plain[1:]) < TOLERANCE
    assert list(denoiser.state_dict()) == names
    # With and without gradients it is the same code, so old and new log-probs are the same bits.
    with torch.no_grad():
        again = denoiser(**inputs)[0]
    assert torch.equal(again, fast[0]) and not again.requires_grad
    # The tail of an epoch does not compile.
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    outputs(denoiser, rows=ROWS - 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0
    uncompile(denoiser)
    assert not any("forward" in module.__dict__ for module in denoiser.modules())


def test_everything_compiled(planned, no_compiler, monkeypatch):
    monkeypatch.setattr(Probe, "time", lambda self, calls: {name: 1.0 if name == "fast" else 2.0 for name in calls})
    denoiser, reference = small_unet(), small_unet().requires_grad_(False)
    plain = outputs(denoiser)[0]
    speed = choose(denoiser, reference)
    values = {name: decision.value for name, decision in speed.decisions.items() if name.startswith("compile")}
    assert values == {"compile trained": "blocks", "compile rollout": "full", "compile reference": "full"}
    view = speed.sampling_view(denoiser)
    assert isinstance(view, CompiledForward)
    assert distance(outputs(denoiser, gradients=False, call=view), [plain]) < TOLERANCE
    assert distance(outputs(reference, gradients=False), [plain]) < TOLERANCE
    json.dumps(speed.record())


def failing(graph, example_inputs):
    raise RuntimeError("no C++ compiler found\nand many lines more")


def wrong(graph, example_inputs):
    return lambda *args: tuple(value * 1.1 if isinstance(value, torch.Tensor) else value for value in graph(*args))


@pytest.mark.parametrize(("backend", "words"), [(failing, "RuntimeError: no C"), (wrong, "off by")])
def test_a_compiler_that_fails_or_errs_is_left(planned, monkeypatch, backend, words):
    monkeypatch.setattr("prdp_fast.acceleration.compile.BACKEND", backend)
    denoiser = small_unet()
    plain = outputs(denoiser)
    speed = choose(denoiser, small_unet().requires_grad_(False), attention="sdpa")
    lines = [line for line in str(speed).splitlines() if "compile" in line]
    assert len(lines) == 1 and words in lines[0], lines
    assert "many lines" not in str(speed)
    assert speed.sampling_view(denoiser) is denoiser
    assert all(torch.equal(*pair) for pair in zip(outputs(denoiser), plain))
    with pytest.raises(UserError, match=rf"performance\.compile does not work here: .*{words}.*; set auto or off"):
        choose(denoiser, compile="full", attention="sdpa")


def test_no_faster_is_not_kept(planned, no_compiler, monkeypatch):
    monkeypatch.setattr(Probe, "time", lambda self, calls: dict.fromkeys(calls, 1.0))
    denoiser = small_unet()
    speed = choose(denoiser)
    assert [speed.decisions[f"compile {role}"].reason for role in ("trained", "rollout")] == ["no faster"] * 2
    assert "forward" not in denoiser.__dict__


def test_plans():
    plan = acceleration.plan_compiling
    assert {decision.value for decision in plan("auto", CPU, 2, {}).values()} == {"off"}
    assert "minutes" in plan("auto", CPU, 2, {})["trained"].reason
    cuda = torch.device("cuda")
    assert [d.value for d in plan("auto", cuda, 2, {}).values()] == ["blocks", "full", "full"]
    assert [d.value for d in plan("full", cuda, 3, {}).values()] == ["off", "full", "full"]
    assert [d.value for d in plan("auto", cuda, 2, {"compile": "off"}).values()] == ["off"] * 3
    assert [d.value for d in plan("auto", cuda, 2, {"compile rollout": "off"}).values()] == ["blocks", "off", "full"]


def test_a_second_start_finds_the_first_one_s_code(tmp_path, monkeypatch):
    """Two layers through the true compiler, which counts what it finds in its cache."""
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_AUTOGRAD_CACHE"):
        monkeypatch.setenv(name, "")  # put back afterwards
    process.prepare_process(PerformanceSettings(compile_cache=str(tmp_path / "cache")), CPU, torch.float32)
    monkeypatch.setattr("prdp_fast.acceleration.compile.BACKEND", "inductor")
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).requires_grad_(False)
    x = torch.randn(4, 8)

    def start() -> dict[str, int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        fast = CompiledForward(own_forward(layers), [4])
        assert distance([fast(x)], [layers(x)]) < TOLERANCE
        counters = torch._dynamo.utils.counters["inductor"]
        return {name: counters[f"fxgraph_cache_{name}"] for name in ("hit", "miss")}

    assert start() == {"hit": 0, "miss": 1}
    assert any((tmp_path / "cache").iterdir())
    assert start() == {"hit": 1, "miss": 0}


# ---------------------------------------------------------------------------------------------------------- the small switches
@pytest.mark.parametrize(
    ("performance", "words"),
    [
        ({"tf32": "on"}, "performance.tf32 is on"),
        ({"compile_cache": "/proc/none"}, "performance.compile_cache /proc/none"),
    ],
)
def test_refused_before_anything_is_loaded(performance, words):
    with pytest.raises(UserError) as error:
        process.prepare_process(PerformanceSettings(**performance), CPU, torch.float32)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_graphs_are_for_cuda():
    with pytest.raises(UserError, match="cuda_graphs is on, but needs a CUDA device; set auto or off"):
        choose(small_unet(), cuda_graphs="on", compile="off")
    assert choose(small_unet(), compile="off").decisions["cuda_graphs"] == Decision("off", "needs a CUDA device")


def test_a_capture_is_for_its_rows_and_without_gradients():
    captured = CudaGraphForward(lambda x: ("plain", x), [ROWS])
    with torch.no_grad():
        assert captured(torch.zeros(ROWS - 1))[0] == "plain"
    assert captured(torch.zeros(ROWS))[0] == "plain"


def test_fused_adamw(monkeypatch):
    assert process.choose_fused_optimizer("auto", CPU, offload=False).value == "on"
    assert process.choose_fused_optimizer("off", CPU, offload=False).value == "off"
    results = []
    for fused in (False, True):
        denoiser = small_unet()
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3, eps=1e-4, weight_decay=1e-2, fused=fused)
        for _ in range(3):
            for parameter, gradient in zip(denoiser.parameters(), outputs(denoiser)[1:]):
                parameter.grad = gradient
            optimizer.step()
        results.append([parameter.detach() for parameter in denoiser.parameters()])
    moved = [[after - before for after, before in zip(result, small_unet().parameters())] for result in results]
    assert distance(moved[1], moved[0]) < 1e-4  # a difference of weights near 1: their rounding is 1e-4 of a step of 1e-3

    def unsupported(*args, **kwargs):
        raise RuntimeError("`fused=True` requires all the params to be on one of cuda")

    monkeypatch.setattr(torch.optim, "AdamW", unsupported)
    assert "requires all the params" in process.choose_fused_optimizer("auto", CPU, offload=False).reason
    with pytest.raises(UserError, match="fused_optimizer is on"):
        process.choose_fused_optimizer("on", CPU, offload=False)


def test_freed_memory_stays():
    """The pages of a large tensor are faulted in once, not with every new tensor."""
    import resource

    if process.keep_heap().value != "kept":
        pytest.skip("not glibc")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            torch.ones(2 << 20)  # 8 MiB, 2,048 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 1024


# --------------------------------------------------------------------------------------------------------------------- probing
def test_a_probe_leaves_no_gradient_behind():
    denoiser = small_unet()
    outputs(denoiser)
    assert all(parameter.grad is None for parameter in denoiser.parameters())


def test_a_wrong_gradient_is_found():
    probe = probe_of(small_unet())
    plain = probe.run(probe.inputs())
    probe.check(plain, plain)
    with pytest.raises(Unsuitable, match="its gradient is off by 1"):
        probe.check([plain[0], *(2 * value for value in plain[1:])], plain)
    with pytest.raises(Unsuitable, match="its output is off by nan"):
        probe.check([plain[0] * torch.nan, *plain[1:]], plain)


def test_choosing_times_only_what_works():
    denoiser = small_unet()
    bad = {"default": lambda: None, "broken": lambda: 1 / 0}
    assert choose_variant(probe_of(denoiser), bad, "default") == (
        "default",
        {},
        {"broken": "ZeroDivisionError: division by zero"},
    )
    assert fastest({"a": 10.0, "b": 9.8}, "a", 0.03) == "a"
    assert fastest({"a": 10.0, "b": 9.6}, "a", 0.03) == "b"


# ------------------------------------------------------------------------------------------------------------------ ZeRO stages
@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, dict]:
    path = tmp_path_factory.mktemp("acceleration") / "results.json"
    launching.run(ROOT / "tests/drive_acceleration.py", path, ranks=1, cwd=path.parent)
    return json.loads(path.read_text())


@pytest.mark.parametrize("stage", range(4))
def test_stages_with_everything_on(stages, stage):
    case = stages[f"zero{stage}"]
    assert case["names_kept"]
    assert max(case["outputs"].values()) < TOLERANCE
    assert case["norms"][1] == pytest.approx(case["norms"][0], rel=TOLERANCE)
    assert case["moved"] < 1e-3  # weights near 1 that moved by 1e-3 a step, rounded to 1e-7
    decisions = case["decisions"]
    assert decisions["shared_halves"] == "on"
    expected = {0: (), 1: ("blocks", "blocks"), 2: ("full", "full"), 3: ("off", "full")}[stage]
    assert tuple(decisions[f"compile {role}"] for role in ("trained", "rollout") if stage) == expected
    if stage < 2:
        assert decisions["fuse_qkv"] == "on"


def test_xformers_without_its_cuda_runtime_is_explained(monkeypatch):
    """As beside a torch for CUDA 13, where its wheels for CUDA 12 are found and do not load."""
    assert attention.xformers_fault() is None  # no CUDA here
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(attention, "find_spec", lambda name: object())

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(attention.ctypes, "CDLL", missing)
    line = attention.xformers_fault()
    assert "no libcudart.so.12 beside a torch for CUDA 13.0" in line and "pip install nvidia-cuda-runtime-cu12" in line
    # and that is the reason that is told, whatever the dispatcher says.
    monkeypatch.setattr(attention, "candidates", lambda device: ("sdpa", "xformers"))
    real = attention.set_attention

    def refusing(denoiser, name):
        if name == "xformers":
            raise RuntimeError("No operator found")
        real(denoiser, name)

    monkeypatch.setattr(attention, "set_attention", refusing)
    reason = choose(small_unet(), attention="auto").decisions["attention"].reason
    assert "no xformers: xformers is built for CUDA 12" in reason
    monkeypatch.setattr(attention.ctypes, "CDLL", lambda name: object())
    assert attention.xformers_fault() is None
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(attention.ctypes, "CDLL", missing)
    assert attention.xformers_fault() is None


def test_a_try_takes_no_more_than_its_share_of_the_memory(monkeypatch):
    denoiser = small_unet()
    heads = max(layer.heads for layer in attention.attention_layers(denoiser))
    needed = attention.math_bytes(denoiser, ROWS, 16)
    assert needed == 3 * ROWS * heads * 16 * 16 * 4
    # SD 1 at 32 rows: 8 heads, 64 x 64 tokens: a matrix of 16 GiB, three times.
    assert 32 * 8 * 4096**2 * 4 == 16 * 2**30
    for room, tried in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(Probe, "room", lambda self, room=room: room)
        decision = choose(denoiser, attention="auto").decisions["attention"]
        assert ("math" in decision.milliseconds) == tried
        assert ("no math: it would take" in decision.reason) != tried


def test_trying_shows_no_warning(recwarn):
    def noisy():
        warnings.warn("a kernel of another library was not found", stacklevel=1)

    denoiser = small_unet()
    _, times, faults = choose_variant(probe_of(denoiser), {"sdpa": lambda: None, "noisy": noisy}, "sdpa")
    assert len(times) == 2 and not faults
    assert not recwarn.list


def test_a_kernel_that_a_run_had_and_that_fails_now_is_told():
    """A resumed run would round otherwise without a word."""
    decision = choose(small_unet(), attention="auto", remembered={"attention": {"value": "flash"}}).decisions["attention"]
    assert decision.value in ("sdpa", "math")
    assert "flash needs another device than cpu" in decision.reason


def test_a_resumed_run_records_and_tells_what_changed(tmp_path):
    from prdp_fast.core.files import read_json, write_json
    from prdp_fast.core.run_directory import ACCELERATION
    from prdp_fast.training.speed import remember

    said: list[str] = []
    chosen = acceleration.Acceleration(
        {"attention": Decision("sdpa", "flash does not work here"), "tf32": Decision("off", "as set")}
    )
    remember(chosen, tmp_path, said.append)
    assert not said and read_json(tmp_path / ACCELERATION)["attention"]["value"] == "sdpa"
    write_json(tmp_path / ACCELERATION, chosen.record() | {"attention": {"value": "flash", "reason": "", "milliseconds": {}}})
    remember(chosen, tmp_path, said.append)
    assert len(said) == 1 and said[0].startswith("attention was 'flash' when the run started and is 'sdpa' now (flash does not")
    assert read_json(tmp_path / ACCELERATION)["attention"]["value"] == "sdpa"
    remember(chosen, tmp_path, said.append)
    assert len(said) == 1


@pytest.mark.parametrize(("rows", "graphs"), [(ROWS, 1), (ROWS + 1, 2)])
def test_rollout_and_reference_share_what_is_compiled(planned, monkeypatch, rows, graphs):
    """They are one graph without gradients where they have the same rows. Compiling takes a minute on a GPU."""
    compiled: list[int] = []

    def count(graph, example_inputs):
        compiled.append(len(example_inputs))
        return graph

    monkeypatch.setattr("prdp_fast.acceleration.compile.BACKEND", count)
    denoiser, reference = small_unet(), small_unet(1).requires_grad_(False)
    plain = outputs(reference, gradients=False, rows=rows)
    performance = PerformanceSettings(compile="full", attention="sdpa", fuse_qkv="off")
    accelerate(
        Denoisers(denoiser, None, reference), performance, small_family(), train_rows=rows, sample_rows=ROWS, stage=3, device=CPU,
        dtype=torch.float32,
    )  # fmt: skip
    assert len(compiled) == graphs
    with torch.no_grad():
        assert distance(outputs(reference, gradients=False, rows=rows), plain) < TOLERANCE  # of its own weights
    assert len(compiled) == graphs
