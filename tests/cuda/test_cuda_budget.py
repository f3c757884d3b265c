"""The tools of benchmarks/cuda: occupancy, reading the SASS, the table, and the model of time."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Backend
from emulator.device import Emulator

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "cuda"))

import budget
import executed
import model
import sass
from devices import A100, H200, Device
from layout import STORAGES, Problem, dynamic_shared
from occupancy import Occupancy, occupancy

KIB = 1024


# By hand from the programming guide's table: 65536 registers, handed out 256 at a time to a warp.
@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "expected"),
    [
        # 2048 threads / 128; 64 registers: 2048 a warp, 32 warps.
        (80, 128, 32, 0, Occupancy(16, 1.0, "warps")),
        (80, 128, 64, 0, Occupancy(8, 0.5, "registers")),
        # 65 registers are handed out as 72: 2304 a warp, 7 warps in each quarter, 28 / 4 = 7.
        (80, 128, 65, 0, Occupancy(7, 28 / 64, "registers")),
        # 255 registers: 8192 a warp, 2 warps in each quarter.
        (90, 128, 255, 0, Occupancy(2, 8 / 64, "registers")),
        # 32 threads: one warp a block, and the number of blocks is what ends it.
        (75, 32, 32, 0, Occupancy(16, 0.5, "blocks")),
        (86, 32, 32, 0, Occupancy(16, 16 / 48, "blocks")),
        (89, 32, 32, 0, Occupancy(24, 0.5, "blocks")),
        # Each block takes 1 KiB more than it asks for, except on sm_75.
        (80, 128, 32, 40 * KIB, Occupancy(4, 0.25, "shared memory")),
        (90, 128, 32, 40 * KIB, Occupancy(5, 20 / 64, "shared memory")),
        (75, 128, 32, 32 * KIB, Occupancy(2, 0.25, "shared memory")),
        (80, 128, 32, 163 * KIB, Occupancy(1, 4 / 64, "shared memory")),
        (80, 128, 32, 163 * KIB + 1, Occupancy(0, 0.0, "shared memory")),
        (120, 128, 32, 49 * KIB, Occupancy(2, 8 / 48, "shared memory")),
        # 1024 threads of 72 registers need 73728.
        (100, 1024, 65, 0, Occupancy(0, 0.0, "registers")),
        # 3 warps a block: 10 blocks of them in 32 warps.
        (75, 96, 32, 0, Occupancy(10, 30 / 32, "warps")),
    ],
)
def test_occupancy(
    arch: int, threads: int, registers: int, shared: int, expected: Occupancy
) -> None:
    assert occupancy(arch, threads, registers, shared) == expected


# What NVIDIA's cuda_occupancy.h (CUDA 13.0) answers: arch, threads, registers, bytes -> blocks.
@pytest.mark.parametrize(
    "case",
    [
        (75, 61, 68, 31538, 2),
        (75, 266, 122, 43766, 1),
        (80, 166, 94, 37949, 3),
        (86, 114, 244, 49676, 2),
        (89, 751, 30, 0, 2),
        (90, 717, 5, 67933, 2),
        (120, 425, 22, 61540, 1),
    ],
)
def test_occupancy_of_nvidias_header(case: tuple[int, ...]) -> None:
    *kernel, blocks = case
    assert occupancy(*kernel).blocks == blocks


COPY = (
    "_ZN9setformer4cuda37_GLOBAL__N__757e7e21_7_copy_cu_a247014811copy_kernelI6__halfEEvPKT_PS4_i"
)
HEADER = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]
"""
SASS = f"""{HEADER}
\t\tFunction : {COPY}
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;             /* 0x00000a00ff017b82 */
                                                                      /* 0x000e300000000800 */
        /*00c0*/              @!PT LDS RZ, [RZ] ;                     /* 0x00000000ffffff84 */
        /*00f0*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR6][R2.64] ;  /* 0x0000 */
        /*0100*/                   LDGDEPBAR ;                        /* 0x00000000000079af */
        /*0120*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;      /* 0x0000000000007b1d */
        /*0130*/               @P0 LDG.E.128 R4, desc[UR4][R2.64] ;   /* 0x000000000000094d */
        /*0140*/              @!P1 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;   /* 0x00000000 */
        /*0150*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;   /* 0x000000000000094d */
        /*0158*/                   LD.E.64 R4, desc[UR4][R2.64] ;     /* 0x000000000000094d */
        /*0160*/             @!UP0 LDS.U16 R5, [R0] ;                 /* 0x0000000000057984 */
        /*0170*/                   LDSM.16.MT88.4 R4, [R0] ;          /* 0x000000000004783b */
        /*0180*/                   HMMA.16816.F32.BF16 R8, R4, R12, R8 ;  /* 0x00000c0408 */
        /*0190*/                   MUFU.EX2 R3, R3 ;                  /* 0x0000000300037308 */
        /*01a0*/                   FFMA.FTZ R3, R3, R4, R5 ;          /* 0x0000000300037308 */
        /*01b0*/                   STL.64 [R1], R4 ;                  /* 0x0000000300037308 */
        /*01c0*/                   LDL R4, [R1+0x8] ;                 /* 0x0000000300037308 */
        /*01d0*/                   EXIT ;                             /* 0x000000000000794d */
        /*01e0*/                   NOP;                               /* 0x0000000000007918 */
\t\t..........
"""
COUNTS = {
    "HMMA": 1,
    "LDSM": 1,
    "LDGSTS": 1,
    "LDG.128": 2,
    "LDG": 3,
    "LD": 1,
    "LDS": 1,
    "MUFU": 1,
    "FFMA": 1,
    "DFMA": 0,
    "BAR": 1,
    "local": 2,
    "all": 16,
}


def test_instructions_are_counted_by_opcode_and_not_where_they_never_run() -> None:
    assert sass.parse_instructions(SASS.splitlines()) == {(90, COPY): COUNTS}


def test_shared_memory_is_the_kernels_own_from_sm_90_on_too() -> None:
    usage = f"""
arch = sm_80
Resource usage:
 Common:
  GLOBAL:0
 Function {COPY}:
  REG:12 STACK:0 SHARED:2048 LOCAL:0 CONSTANT[0]:372 TEXTURE:0 SURFACE:0 SAMPLER:0
{HEADER}
 Function {COPY}:
  REG:10 STACK:0 SHARED:3072 LOCAL:0 CONSTANT[0]:548 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert sass.parse_resources(usage.splitlines()) == {
        (80, COPY): (12, 2048),
        (90, COPY): (10, 2048),
    }


def test_threads_are_those_of_the_launch_bounds() -> None:
    sections = f"""
    d   bc80     64  0  4   CUDA_INFO   40    3   18 .nv.info.{COPY}
\tTool Name: ptxas
\tTool Version: Cuda compilation tools, release 13.0, V13.0.88
.nv.info.{COPY}
\t<0x10>
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x40 0x2 0x1
"""
    assert sass.parse_headers(sections.splitlines()) == ({COPY: 128}, "13.0.88")


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void setformer::cuda::(anonymous namespace)::copy_kernel<__half>(__half const*, int)",
            "copy_kernel<__half>",
        ),
        (
            "void setformer::cuda::sum_kernel<setformer::cuda::Add<float>, (bool)1>(float*)",
            "sum_kernel<Add<float>, (bool)1>",
        ),
        ("setformer::cuda::probe()", "probe"),
    ],
)
def test_short_names(demangled: str, short: str) -> None:
    assert sass.shorten(demangled) == short


@pytest.fixture
def kernel() -> sass.Kernel:
    return sass.Kernel(
        "merge_sums_kernel<float>", 90, "13.0.88", 128, 64, 2048, COUNTS | {"local": 0}
    )


def test_a_row_of_the_table(kernel: sass.Kernel) -> None:
    row = budget.row_of(kernel)
    assert list(row) == budget.COLUMNS
    assert (row["blocks"], row["occupancy"], row["limit"]) == ("8", "0.50", "registers")
    assert budget.compare([row], [row]) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"BAR": "2"}, "merge_sums_kernel<float> sm_90: BAR 2, was 1"),
        ({"HMMA": "0"}, "merge_sums_kernel<float> sm_90: HMMA 0, was 1"),
        ({"registers": "66"}, "merge_sums_kernel<float> sm_90: registers 66, was 64"),
        ({"registers": "65"}, None),
        ({"LDS": "2"}, "merge_sums_kernel<float> sm_90: LDS 2, was 1"),
        ({"ptxas": "12.9.1", "BAR": "2"}, None),
        (
            {"ptxas": "12.9.1", "local": "3"},
            "merge_sums_kernel<float> sm_90: 3 accesses of local memory (spills), must be 0",
        ),
    ],
)
def test_what_changed_is_named(
    kernel: sass.Kernel, change: dict[str, str], problem: str | None
) -> None:
    row = budget.row_of(kernel)
    assert budget.compare([row], [row | change])[:1] == ([problem] if problem else [])


def test_spills_fail_also_where_the_table_has_them(kernel: sass.Kernel) -> None:
    row = budget.row_of(kernel) | {"local": "3"}
    assert len(budget.compare([row], [row])) == 1


def test_kernels_that_came_or_went_are_named(kernel: sass.Kernel) -> None:
    row = budget.row_of(kernel)
    new = row | {"kernel": "new_kernel"}
    assert budget.compare([row], [new]) == [
        "merge_sums_kernel<float> sm_90: in budget.csv, not compiled",
        "new_kernel sm_90: not in budget.csv",
    ]
    elsewhere = row | {"arch": "80"}  # an architecture that was not compiled is no problem
    assert budget.compare([row, elsewhere], [row]) == []


def test_a_kernel_without_launch_bounds_is_refused(kernel: sass.Kernel) -> None:
    with pytest.raises(SystemExit, match=r"merge_sums_kernel<float> has no __launch_bounds__"):
        budget.row_of(replace(kernel, threads=0))


def test_a_kernel_that_no_multiprocessor_can_hold_fails(kernel: sass.Kernel) -> None:
    row = budget.row_of(replace(kernel, shared=228 * KIB))
    assert budget.compare([row], [row]) == [
        "merge_sums_kernel<float> sm_90: not one block fits a multiprocessor (shared memory)"
    ]


def test_a_kernel_compiled_twice_is_one_row_if_alike(kernel: sass.Kernel) -> None:
    row = budget.row_of(kernel)
    assert budget.unique([row, dict(row)]) == [row]
    with pytest.raises(SystemExit, match="compiled twice"):
        budget.unique([row, row | {"BAR": "2"}])


LISTING = """
//--------------------- .text._Z6kernelv --------------------------
	.section	.text._Z6kernelv,"ax",@progbits
.text._Z6kernelv:
	//## File "/a/csrc/cuda/pass.cuh", line 7
        /*0000*/                   MOV R1, c[0x0][0x28] ;
	//## File "/i/shuffle.hpp", line 3 inlined at "/a/csrc/cuda/chip/../sums.cuh", line 5
	//## File "/a/csrc/cuda/chip/../sums.cuh", line 5 inlined at "/a/csrc/cuda/pass.cuh", line 8
	//## File "/a/csrc/cuda/pass.cuh", line 8
        /*0010*/                   BRA.DIV ~URZ, `(.L_x_2) ;
.L_x_1:
        /*0020*/                   SHFL.BFLY PT, R9, R26, 0x1, 0x1f ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   CALL.REL.NOINC `($__internal_0_$shuffle) ;
        /*0070*/                   BRA `(.L_x_1) ;
$__internal_0_$shuffle:
        /*0080*/                   RET.REL.NODEC R8 `(_Z6kernelv) ;
"""


def test_instructions_of_lines_are_those_that_mostly_run() -> None:
    assert sass.parse_lines(LISTING.splitlines()) == {
        "_Z6kernelv": {("cuda/pass.cuh", 7): 1, ("cuda/sums.cuh", 5): 4}
    }


def test_what_a_head_executes(backend: Backend) -> None:
    """A window counted anew, but for what is issued; between T = 2 and 5 model.py interpolates."""
    if not backend.emulated:
        pytest.skip("only the emulated device counts instructions")
    counted = executed.Counted(None)
    head, issued = (49, 32, 49), executed.COLUMNS.index("issued")
    now = [list(map(str, row)) for row in counted.head(*head, 1)]
    table = [row for row in executed.table() if row[:5] == now[0][:5]]
    for row in table:
        row[issued] = "0"
    assert executed.differences(table, now) == []
    now[0][issued + 1] = str(2 * int(now[0][issued + 1]))
    assert len(executed.differences(table, now)) == 1
    p = Problem(1, 1, *head, steps=3)
    for row, launch in zip(
        counted.head(*head, 3), model.forward(p, A100) + model.backward(p, A100), strict=True
    ):
        tensor, special, shuffle, shared, cache = row[issued + 1 :]
        assert row[6] == launch.kernel
        assert launch.work.tensor == pytest.approx(tensor * 4096, rel=0.01)
        assert launch.work.special == pytest.approx(special * 32, rel=0.01)
        assert launch.work.shared == pytest.approx((shuffle + shared) * 128, rel=0.01)
        assert launch.work.cache == pytest.approx(cache * 128, rel=0.01)


def test_a_launch_takes_as_long_as_its_slowest_resource() -> None:
    work = model.Work(memory=2.039e12 * 3e-6, special=16 * 108 * 1.41e9 * 5e-6)
    for times, blocks, micro in ((1, 108, 7), (1, 54, 12), (3, 500, 21)):
        launch = model.Launch("any", times, blocks, work)
        assert launch.seconds(A100) == pytest.approx(micro * 1e-6)
        assert launch.work.slowest(A100, blocks)[0] == "special"


@pytest.mark.parametrize("launches", [model.forward, model.backward])
def test_work_grows_with_tokens_heads_and_steps(
    launches: Callable[[Problem, Device], list[model.Launch]],
) -> None:
    def issued(p: Problem) -> float:
        return sum(launch.times * launch.work.issue for launch in launches(p, H200))

    p = Problem(batch=2, heads=3, tokens=20000, depth=64, references=128, steps=1)
    once = issued(p)
    assert issued(replace(p, tokens=2 * p.tokens)) == pytest.approx(2 * once)
    assert issued(replace(p, batch=4)) == pytest.approx(2 * once)
    two, three, four = (issued(replace(p, steps=steps)) for steps in (2, 3, 4))
    assert once < two
    assert four - three == pytest.approx(three - two)
    for head in ({"tokens": 500}, {"references": 64}):  # on chip, or counted only there
        with pytest.raises(ValueError, match="has no head of"):
            launches(replace(p, **head), H200)


def test_what_cannot_be_gone_below() -> None:
    p = Problem(1, 1, 1024, 32, 49)
    # 4 x 1024^2 x 32 flop at 740 Tflop/s are faster than 1024^2 exponentials at 16 a clock
    exponentials = 1024**2 / (16 * 132 * 1.83e9)
    assert model.flash_attention(p, H200, False) - model.LAUNCH == pytest.approx(exponentials)
    deep = replace(p, depth=256)
    backward = model.flash_attention(deep, H200, True) - 3 * model.LAUNCH
    assert backward == pytest.approx(3.5 * 4 * 1024**2 * 256 / 740e12)
    # keys and values in, output out
    many = replace(p, batch=1000)
    memory = 3 * 1000 * 1024 * 32 * 2 / 4.8e12
    assert model.floor(many, H200, False) - model.LAUNCH == pytest.approx(memory)
    # of one head of long rows and many references, three products
    wide = replace(p, depth=256, references=128)
    products = 3 * 2 * 1024 * 128 * 256 / 989.4e12
    assert model.floor(wide, H200, False) - model.LAUNCH == pytest.approx(
        max(products, 3 * 1024 * 256 * 2 / 4.8e12)
    )
    shallow = replace(p, depth=1)
    assert model.floor(shallow, H200, True) - 2 * model.LAUNCH == pytest.approx(
        2 * 1024 * 49 / (16 * 132 * 1.83e9)
    )


def test_the_output_says_that_nothing_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["model.py", "--shapes", "v3"])
    model.main()
    printed = capsys.readouterr().out
    assert printed.startswith("Counted, not measured on a GPU.")
    assert "| v3 | 1 | A100 | attention_forward_on_chip_kernel | 1 | 1536 |" in printed


FLOAT = STORAGES["float"]


def test_docs_have_the_figures_of_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["model.py"])
    model.main()
    totals = capsys.readouterr().out.split("\n\n")[1]
    assert totals in (Path(__file__).parents[2] / "docs" / "cuda.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "p",
    [
        Problem(1, 2, tokens=40, depth=20, references=5, steps=2),  # on chip, a warp for backward
        Problem(1, 1, tokens=100, depth=40, references=49, steps=3),  # on chip, four warps
        Problem(1, 1, tokens=300, depth=72, references=70, steps=1),
        Problem(1, 1, tokens=300, depth=20, references=70, steps=1),  # backward on shares
        Problem(1, 1, tokens=2200, depth=16, references=7, steps=2),  # one tile of references
        Problem(1, 1, tokens=520, depth=72, references=70, steps=2),  # several of all
        Problem(1, 2, tokens=40, depth=20, references=5, steps=2, storage=FLOAT),  # on chip
        Problem(1, 1, tokens=150, depth=40, references=49, steps=3, storage=FLOAT),  # on shares
        Problem(1, 1, tokens=300, depth=72, references=130, steps=1, storage=FLOAT),
    ],
)
def test_launches_ask_for_the_shared_memory_of_the_layout(backend: Backend, p: Problem) -> None:
    if not backend.emulated:
        pytest.skip("only the emulated device keeps a list of launches")
    dtype = torch.half if p.storage.element == 2 else torch.float32
    shape = (p.batch, p.heads, p.tokens, p.depth)
    key, value = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    reference = torch.randn(p.heads, p.references, p.depth).to(dtype).requires_grad_()
    emulator = Emulator(backend.module.__file__)
    emulator.clear_launches()
    output = backend.set_attention(None, key, value, reference, iterations=p.steps, normalize=False)
    output.backward(torch.randn_like(output))
    launches = emulator.launches()
    names = sass.short_names({launch.kernel for launch in launches})
    step = "sinkhorn_step_backward_kernel"
    kernels = [names[launch.kernel].partition("<")[0] for launch in launches]
    for i, (kernel, launch) in enumerate(zip(kernels, launches, strict=True)):
        collects = kernel == step and step not in kernels[:i]  # the step that comes first
        assert launch.shared_bytes == dynamic_shared(kernel, p, collects=collects), kernel
    assert len(launches) >= 2


# What reads tiles, plans and operands over and over.
MAIN_LOOPS = {"product.cuh", "tile.cuh", "similarity.cuh"}


@pytest.mark.parametrize("depth", [32, 64])
@pytest.mark.parametrize("tokens", [128, 1100])  # on chip and resident, and streaming
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bank_conflicts(backend: Backend, dtype: torch.dtype, tokens: int, depth: int) -> None:
    if not backend.emulated:
        pytest.skip("only the emulated device counts passes over the banks")
    key, value = (torch.randn(1, 1, tokens, depth).to(dtype).requires_grad_() for _ in range(2))
    reference = torch.randn(1, 64, depth).to(dtype).requires_grad_()
    emulator = Emulator(backend.module.__file__)
    emulator.clear_trace()
    with emulator.configured(mode="trace"):
        output = backend.set_attention(None, key, value, reference, iterations=2)
        output.backward(torch.randn_like(output))
    shared = [count for count in emulator.trace() if count.space == "shared"]
    passes, least = sum(count.cost for count in shared), sum(count.least for count in shared)
    print(f"{passes} passes over the banks, {least} at best: {passes / least - 1:.2%} more")
    # beside the loops below, where there is none: references and outputs on their way
    assert passes <= 1.02 * least
    for count in shared:
        if count.access == "read" and Path(count.file).name in MAIN_LOOPS:
            assert count.cost == count.least, f"{count.kernel} {count.file}:{count.line}"
