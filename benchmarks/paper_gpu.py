"""Check the GPU path without a GPU: compile what a packed step would run on an H100, down to its machine code.

    python -m benchmarks.paper_gpu            # needs a torch built for CUDA, Triton and a C compiler, and no driver

Models and micro-batches are fake tensors, which have a shape, a dtype and a device, but no values. Everything else is
real: the code of this project and of transformers, TorchDynamo, Inductor's lowering, and Triton's compiler for sm_90.
So it finds operators that do not support a dtype, graph breaks, needless compilations, kernels without a valid
configuration or with too much shared memory, and each place where a step would wait for the device. It cannot find
wrong values, and it measures no time.

The C compiler builds a stand-in for the CUDA runtime, which autograd asks for devices and streams. The process restarts
itself with the stand-in preloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

STAND_IN = "PAPER_GPU_STAND_IN"
DEVICE = "cuda:0"
WINDOW = 64
SHARED_MEMORY = 232_448  # bytes that a block of an H100 may have
SUCCEEDING = (
    "SetDevice", "GetLastError", "PeekAtLastError", "StreamQuery", "StreamSynchronize", "DeviceSynchronize",
    "StreamWaitEvent", "EventDestroy", "EventQuery", "EventRecord", "EventRecordWithFlags", "EventSynchronize",
)  # fmt: skip
DRIVER = (  # what torch looks up in libcuda, and Triton
    "CtxGetDevice", "CtxGetLimit", "CtxSetCurrent", "CtxSetLimit", "CtxSynchronize", "DeviceGet", "DeviceGetAttribute",
    "DeviceGetCount", "DeviceGetName", "DevicePrimaryCtxRetain", "DriverGetVersion", "FuncGetAttribute",
    "FuncSetAttribute", "FuncSetCacheConfig", "GetErrorName", "GetErrorString", "Init", "LaunchCooperativeKernel",
    "LaunchKernel", "LaunchKernelEx", "LinkAddData_v2", "LinkComplete", "LinkCreate_v2", "LinkDestroy",
    "MemcpyDtoHAsync_v2", "ModuleGetFunction", "ModuleGetGlobal_v2", "ModuleLoad", "ModuleLoadData", "ModuleLoadDataEx",
    "ModuleUnload", "OccupancyMaxActiveBlocksPerMultiprocessor", "OccupancyMaxActiveClusters", "PointerGetAttribute",
    "StreamSynchronize", "TensorMapEncodeTiled",
)  # fmt: skip
ANSWERING = {
    "GetDeviceCount(int *n)": "*n = 1",
    "GetDevice(int *n)": "*n = 0",
    "DriverGetVersion(int *n)": "*n = 13000",
    "RuntimeGetVersion(int *n)": "*n = 13000",
    "DeviceGetStreamPriorityRange(int *low, int *high)": "*low = 0, *high = -5",
    "StreamCreateWithPriority(void **stream)": "*stream = (void *)8",
    "EventCreateWithFlags(void **event)": "*event = (void *)16",
    "StreamIsCapturing(void *stream, int *status)": "*status = 0",
    "MemGetInfo(unsigned long *free, unsigned long *total)": "*free = *total = 80ul << 30",
    "DeviceGetAttribute(int *value, int attribute)": "*value = attribute == 75 ? 9 : attribute == 16 ? 132 : 0",
}


def start_again_with_stand_in() -> None:
    """Restart this command with a CUDA runtime that has one device and does nothing."""
    source = "".join(f"int cuda{name}(void) {{ return 0; }}\n" for name in SUCCEEDING)
    source += "".join(f"int cuda{head} {{ {body}; return 0; }}\n" for head, body in ANSWERING.items())
    source += "".join(f"int cu{name}(void) {{ return 0; }}\n" for name in DRIVER)
    source += "int cuCtxGetCurrent(void **context) { *context = (void *)32; return 0; }\n"
    source += "int cuDevicePrimaryCtxGetState(int d, int *flags, int *active) { *flags = 0, *active = 1; return 0; }\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stand_in.c"
        path.write_text(source)
        library = Path(folder) / "libcuda.so.1"  # by this name torch and Triton look for the driver
        name = "-Wl,-soname,libcuda.so.1"
        subprocess.run(["cc", "-shared", "-fPIC", name, "-o", library, path], check=True)
        environment = {**os.environ, "LD_PRELOAD": str(library), "TRITON_LIBCUDA_PATH": folder, STAND_IN: "1"}
        command = [sys.executable, "-m", "benchmarks.paper_gpu", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment).returncode)


def pretend_h100() -> None:
    """Make torch believe that there is one H100."""
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, warp_size=32,
        shared_memory_per_block=49152, shared_memory_per_block_optin=SHARED_MEMORY, L2_cache_size=50 << 20,
        shared_memory_per_multiprocessor=233_472, gcnArchName="", is_integrated=0, is_multi_gpu_board=0,
    )  # fmt: skip
    from torch._dynamo.device_interface import CudaInterface
    from torch._subclasses import fake_tensor

    torch._C._ensureCUDADeviceGuardSet()
    fake_tensor.init_gpu_context = lambda *arguments: None
    stream = types.SimpleNamespace(cuda_stream=0, stream_id=0, device_index=0, device_type=1)
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": properties,
        "get_device_capability": (9, 0), "get_device_name": properties.name, "_lazy_init": None, "synchronize": None,
        "is_bf16_supported": True, "current_stream": stream, "get_rng_state": state, "set_rng_state": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *arguments, answer=answer, **keywords: answer)
        if name.endswith("rng_state") or name == "_lazy_init":
            setattr(torch.cuda.random, name, getattr(torch.cuda, name))
    torch._C._cuda_getCurrentRawStream = lambda *arguments: 0
    known = {
        "is_available": True, "current_device": 0, "get_compute_capability": 90, "is_triton_capable": True,
        "raise_if_triton_unavailable": None, "get_raw_stream": 0, "synchronize": None,
        "get_device_properties": properties,
    }  # fmt: skip
    worker = {"set_device": None, "current_device": 0, "get_device_properties": properties}
    for owner, values in ((CudaInterface, known), (CudaInterface.Worker, worker)):
        for name, answer in values.items():
            setattr(owner, name, staticmethod(lambda *arguments, answer=answer, **keywords: answer))


class Compiled(BaseException):
    """Raised after Inductor has written a graph's code, to skip loading it; `except Exception` does not catch it."""


class PaperCompiler:
    """A backend of torch.compile that lowers each graph for the H100 and then runs it uncompiled, on fake tensors.

    Attributes:
        graphs: Number of lowered graphs, by the operator that they contain and the kind of pass.
        kernels: The names of the Triton kernels that were written.
        shared_memory: Bytes of shared memory of each kernel compiled to sm_90, by name and number.
    """

    def __init__(self, *, to_machine_code: bool) -> None:
        from functorch.compile import min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.decomposition import select_decomp_table
        from torch._inductor.graph import GraphLowering

        self._torch_compile = torch.compile
        self.to_machine_code = to_machine_code
        self.graphs: Counter[str] = Counter()
        self.kernels: list[str] = []
        self.shared_memory: dict[str, int] = {}
        GraphLowering.compile_to_module = lambda lowering: self._keep_code(lowering)  # nothing can be loaded here
        self.backend = aot_autograd(
            fw_compiler=self._compiler("forward"), bw_compiler=self._compiler("backward"),
            inference_compiler=self._compiler("inference"), decompositions=select_decomp_table(),
            partition_fn=min_cut_rematerialization_partition,
        )  # fmt: skip

    def compile(self, *arguments: Any, options: dict[str, Any] | None = None, **keywords: Any) -> Any:
        """Be `torch.compile`; a backend of our own would not be given the options of Inductor."""

        def backend(*graph: Any, **others: Any) -> Any:
            with torch._inductor.config.patch(options or {}):
                return self.backend(*graph, **others)

        return self._torch_compile(*arguments, **keywords, backend=backend)

    def _compiler(self, kind: str) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func
        from torch._inductor.compile_fx import compile_fx_inner

        def compile(graph: Any, inputs: list[Any], **keywords: Any) -> Any:
            has_flex = any("flex_attention" in str(node.target) for node in graph.graph.nodes)
            self.graphs[f"{'flex' if has_flex else 'head'} {kind}"] += 1
            with suppress(Compiled):
                compile_fx_inner(graph, inputs, is_backward=kind == "backward", is_inference=kind == "inference")
            return make_boxed_func(graph.forward)

        return compile

    def _keep_code(self, lowering: Any) -> None:
        code = lowering.codegen()[0]
        text = code if isinstance(code, str) else code.value
        for name, source in triton_sources(text):
            self.kernels.append(name)
            # Kernels that Inductor fused before or after flex_attention are also named after it.
            if self.to_machine_code and "flex" in name and "triton_heuristics.template" in source:
                self.shared_memory[f"{name} {len(self.shared_memory)}"] = compile_for_h100(source)
        raise Compiled


def triton_sources(code: str) -> Iterator[tuple[str, str]]:
    """Yield (name, source) of the kernels in the code that Inductor has written."""
    for part in code.split("async_compile.triton(")[1:]:
        name, _, rest = part.partition(", '''")
        yield name.strip("'"), rest.partition("'''")[0]


def compile_for_h100(source: str) -> int:
    """Compile a kernel to sm_90; return the bytes of shared memory that it takes."""
    import triton
    from torch._inductor.runtime import triton_heuristics
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    taken: list[tuple[Any, dict[str, Any]]] = []
    kept = triton_heuristics.template
    triton_heuristics.template = lambda **how: lambda kernel: taken.append((kernel, how))
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:  # Triton reads the source again
            file.write(source)
        exec(compile(source, file.name, "exec"), {"__name__": "kernel", "__file__": file.name})
    finally:
        triton_heuristics.template = kept
    ((kernel, how),) = taken
    meta = how["triton_meta"]
    names = list(meta["signature"])
    constants = {(names.index(name),): value for name, value in meta.get("constants", {}).items()}
    ast = ASTSource(fn=kernel, signature=meta["signature"], constexprs=constants, attrs=meta.get("configs", [{}])[0])
    options = {"num_warps": how["num_warps"], "num_stages": how["num_stages"]}
    result = triton.compile(ast, target=GPUTarget("cuda", 90, 32), options=options)
    Path(file.name).unlink()
    return int(result.metadata.shared)


def architectures() -> dict[str, Callable[..., nn.Module]]:
    """Return builders of a small model of each architecture, with a head size of 16, the least that flex supports."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def builder(kind: str, **options: Any) -> Callable[..., nn.Module]:
        def build(**more: Any) -> nn.Module:
            config = AutoConfig.for_model(kind, vocab_size=1000, **{**options, **more})
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")

        return build

    new = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8}
    old = {"n_embd": 128, "n_layer": 2, "n_head": 8, "n_positions": 16384, "resid_pdrop": 0, "embd_pdrop": 0}
    old |= {"attn_pdrop": 0}
    grouped = {**new, "num_key_value_heads": 4}
    found = {
        "llama": builder("llama", **grouped),
        "mistral": builder("mistral", **grouped, sliding_window=WINDOW),
        "qwen2": builder("qwen2", **grouped, tie_word_embeddings=True),
        "gpt_neox": builder("gpt_neox", **new),
        "gpt2": builder("gpt2", **old),
        "gptj": builder("gptj", **old, rotary_dim=8),
    }
    from transformers import GPTJForCausalLM

    if not GPTJForCausalLM._supports_sdpa:  # until transformers 5.18
        del found["gptj"]
    return found


def fake_model(build: Callable[..., nn.Module], dtype: torch.dtype, mode: Any, **options: Any) -> Any:
    """Build a model whose weights are fake tensors on the fake device."""
    with torch.device("meta"):
        model = build(**options)
    made: dict[int, nn.Parameter] = {}
    with mode:
        for module in model.modules():
            for name, weight in list(module._parameters.items()):
                if weight is not None:
                    new = nn.Parameter(torch.empty(weight.shape, dtype=dtype, device=DEVICE))
                    module._parameters[name] = made.setdefault(id(weight), new)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=DEVICE)
    return model


def fake_batch(mode: Any, shapes: list[tuple[int, ...]], num_shared: int) -> dict[str, Any]:
    """Make a packed micro-batch of rows with these segment lengths, and optionally a common prefix."""
    from trainers.data.layout import PackedLayout

    before = torch.tensor([num_shared] + [0] * (len(shapes) - 1))
    layout = PackedLayout(torch.tensor(shapes), before, torch.zeros_like(before) if num_shared else None)
    layout.seen_keys()  # now: these need values
    for window in (None, WINDOW):
        layout.blocks(window)
    targets = sum(sum(shape[1:]) + len(shape) - 1 for shape in shapes)
    sizes: dict[str, tuple[int, ...]] = {
        "input_ids": (layout.num_positions,), "position_ids": (layout.num_positions,), "sources": (targets,),
        "needed": (max(2, targets - len(shapes)),), "targets": (targets,),
        "num_targets": (len(shapes), len(shapes[0]) - 1),
    }  # fmt: skip
    with mode:
        batch: dict[str, Any] = {
            name: torch.empty(size, dtype=torch.int64, device=DEVICE) for name, size in sizes.items()
        }
    return {**batch, "layout": layout}


def rows_of(num_positions: int, segments: int) -> list[tuple[int, ...]]:
    """Make rows of about 120 positions that fill a micro-batch."""
    num_rows = max(1, num_positions // 120)
    own = num_positions // num_rows
    first = own // 3
    return [(first, *[(own - first) // (segments - 1)] * (segments - 1))] * num_rows


@contextmanager
def paper(*, to_machine_code: bool = False) -> Iterator[PaperCompiler]:
    """Return a context that compiles for the H100, each time from scratch."""
    from trainers.kernels import attention, logps

    compiler = PaperCompiler(to_machine_code=to_machine_code)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    kept = torch.compile, attention._to_device
    torch.compile = compiler.compile
    attention._to_device = lambda tensor, device: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    attention._compiled_flex.cache_clear()
    logps._compiled.cache_clear()
    try:
        yield compiler
    finally:
        torch.compile, attention._to_device = kept


def fake_mode() -> Any:
    """Return a mode for fake tensors that also accepts the real tensors of a layout."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def step(model: Any, mode: Any, batch: dict[str, Any], *, autocast: torch.dtype | None, grad: bool) -> Tensor:
    """Run forward and, for a training step, backward."""
    from trainers.kernels.logps import sequence_logps

    with mode, torch.set_grad_enabled(grad):
        logps, _ = sequence_logps(model, batch, autocast=autocast, add_to_grad=grad)
        if grad:
            logps.sum().backward()
    return logps


def every_architecture() -> Iterator[dict[str, Any]]:
    """Take a training step of each architecture, for pairs and for single responses, in each precision."""
    from trainers.kernels.attention import use_packed_attention

    precisions = {
        "float32": (torch.float32, None),
        "bfloat16": (torch.bfloat16, None),
        "autocast": (torch.float32, torch.bfloat16),
    }
    for name, build in architectures().items():
        for precision, (dtype, autocast) in precisions.items():
            with paper() as compiler:
                mode = fake_mode()
                model = fake_model(build, dtype, mode).train()
                use_packed_attention(model)
                for segments, num_shared in ((3, 30), (2, 0)):
                    step(
                        model, mode, fake_batch(mode, rows_of(600, segments), num_shared), autocast=autocast, grad=True
                    )
            yield {"architecture": name, "precision": precision, "graphs": dict(compiler.graphs)}


def every_head(sizes: list[int]) -> Iterator[dict[str, Any]]:
    """Compile attention for grouped queries, from micro-batches of a few positions to full ones, to machine code."""
    from trainers.kernels.attention import use_packed_attention

    for dtype, head in ((torch.float32, 128), (torch.float32, 64)):
        for ratio in (1, 2, 4, 8):
            with paper(to_machine_code=True) as compiler:
                mode = fake_mode()
                options = {
                    "hidden_size": 8 * head, "num_hidden_layers": 1, "num_key_value_heads": 8 // ratio,
                }  # fmt: skip
                model = fake_model(architectures()["llama"], dtype, mode, **options).train()
                use_packed_attention(model)
                for size in sizes:
                    step(model, mode, fake_batch(mode, rows_of(size, 3), 0), autocast=None, grad=True)
            most = max(compiler.shared_memory.values())
            assert most <= SHARED_MEMORY, f"{most} bytes of shared memory: {compiler.shared_memory}"
            yield {
                "dtype": str(dtype), "head": head, "ratio": ratio, "graphs": dict(compiler.graphs),
                "kernels": len(compiler.shared_memory), "shared_memory": most,
            }  # fmt: skip


def whole_run(dtype: torch.dtype, *, compile_blocks: bool) -> dict[str, Any]:
    """Count the compilations of a run: self check, reference, training, evaluation, in micro-batches of all sizes."""
    from trainers.distributed.parallelize import find_blocks
    from trainers.kernels.attention import packed_states, use_packed_attention
    from trainers.kernels.self_check import CHECKED_ROWS

    with paper() as compiler:
        mode = fake_mode()
        model = fake_model(architectures()["llama"], dtype, mode)
        use_packed_attention(model)
        if compile_blocks:
            for block in find_blocks(model, None):
                block.compile()
        model.eval()
        for num_shared, shapes in CHECKED_ROWS:
            batch = fake_batch(mode, shapes, num_shared)
            del batch["needed"]
            with mode, torch.no_grad():
                packed_states(model, batch)
        for grad, sizes in ((False, (8000, 7800, 7000)), (True, (8000, 7800, 7000, 90)), (False, (2000, 1900, 90))):
            model.train(grad)
            for size in sizes:
                step(model, mode, fake_batch(mode, rows_of(size, 3), 30), autocast=None, grad=grad)
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    return {
        "dtype": str(dtype),
        "compile_blocks": compile_blocks,
        "graphs": dict(compiler.graphs),
        "graph_breaks": breaks,
    }


def every_first_size(vocabulary: int = 128_256) -> Iterator[dict[str, Any]]:
    """Compile the head's normalisation with few and with many rows first: the code must be the same."""
    from trainers.kernels import logps

    for rows in (8, 8192):
        with paper() as compiler, fake_mode(), torch.no_grad():
            logits = torch.empty(rows, vocabulary, device=DEVICE)
            logps._compiled(logps._normalise)(logits, None, torch.empty(rows, dtype=torch.int64, device=DEVICE))
        yield {"first_rows": rows, "kernels": compiler.kernels}


def main() -> None:
    """Run all checks, and print one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["run", "architectures", "heads", "first_sizes"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[40, 90, 300, 2000, 8192])
    arguments = parser.parse_args()
    if not os.environ.get(STAND_IN):
        start_again_with_stand_in()
    pretend_h100()
    parts: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "run": lambda: (
            whole_run(dtype, compile_blocks=blocks)
            for dtype, blocks in ((torch.float32, False), (torch.float32, True), (torch.bfloat16, True))
        ),
        "architectures": every_architecture,
        "heads": lambda: every_head(arguments.sizes),
        "first_sizes": every_first_size,
    }
    for part in arguments.parts:
        for result in parts[part]():
            print(json.dumps({"part": part, **result}), flush=True)


if __name__ == "__main__":
    main()
