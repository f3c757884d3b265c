"""Instructions that move data, branch, or make threads meet."""

from __future__ import annotations

from .arithmetic import BITS, INTEGERS
from .emitter import CPP_TYPES, FLOATS, Emitter, comma, label_name, translates
from .ptx import SIZES

SPACES = (
    "global", "shared", "local", "param", "const", "shared::cta", "shared::cluster", "param::entry",
)  # fmt: skip
SCOPES = ("cta", "gpu", "sys", "cluster")
CACHE_HINTS = (
    "ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc",
    "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
    "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B",
)  # fmt: skip
ANY_TYPE = (*SIZES,)


def pointer(e: Emitter, index: int, space: str, size: int, access: str) -> str:
    """C++ for a checked host pointer to operand `index`."""
    of_cluster = space == "shared::cluster"
    space = space.split("::")[0]
    named_space, base, offset = e.address(index)
    if named_space and space and named_space != space:
        raise e.error(f"the address lies in .{named_space}")
    space = space or named_space
    if space == "param" and named_space:
        # Parameters are laid out by the translation: offsets are constants.
        return f"({base} + {offset})"
    check = {
        "shared": "shared_address",
        "local": "local_address",
        "": "generic_address",
    }.get(space, "global_address")
    if of_cluster:
        check = "cluster_address"
    site = f"thread, {e.site}, Access::{access}"
    return f"{check}<{size}>({site}, {base} + uint64_t({offset}))"


@translates("mov")
def move(e: Emitter) -> str:
    type_ = e.type("pred", *BITS, *INTEGERS, *FLOATS)
    e.count(2)
    if e.operands[0].startswith("{"):
        parts = e.vector(0)
        width = 8 * SIZES[type_] // len(parts)
        source = f"const auto packed = {e.value(1, 'b' + type_[1:])};"
        stores = [
            e.assign(part, f"uint{width}_t(packed >> {width * i})")
            for i, part in enumerate(parts)
            if part != "_"
        ]
        return f"{{ {source} {' '.join(stores)} }}"
    if e.operands[1].startswith("{"):
        parts = e.vector(1)
        width = 8 * SIZES[type_] // len(parts)
        cpp = CPP_TYPES["b" + type_[1:]]
        terms = [
            f"{cpp}({e.read(part, f'b{width}')}) << {width * i}" for i, part in enumerate(parts)
        ]
        return e.result(f"{cpp}(({') | ('.join(terms)}))", "b" + type_[1:])
    return e.result(e.value(1, type_), type_)


@translates("cvta")
def convert_address(e: Emitter) -> str:
    to_space = bool(e.take("to"))
    space = e.need(*SPACES).split("::")[0]
    e.type("u64")
    e.count(2)
    address = e.value(1, "u64")
    if space == "shared":
        address += (" - " if to_space else " + ") + "uint64_t(thread.shared)"
    return e.result(address, "u64")


@translates("isspacep")
def is_space(e: Emitter) -> str:
    space = e.need("shared", "shared::cta")
    del space
    e.count(2)
    return e.result(f"in_shared(thread, {e.value(1, 'u64')})")


def memory_modifiers(e: Emitter) -> tuple[str, int, str]:
    """Space, elements and type of ld and st; what only orders or caches is accepted by name."""
    if e.take("weak", "volatile", "relaxed", "acquire", "release"):
        e.skip(*SCOPES)
    space = e.take(*SPACES)
    e.skip(*CACHE_HINTS)
    count = int((e.take("v2", "v4") or "v1")[1:])
    return space, count, e.type(*ANY_TYPE)


@translates("ld")
def load(e: Emitter) -> str:
    space, count, type_ = memory_modifiers(e)
    e.count(2)
    cpp = CPP_TYPES[type_]
    size = SIZES[type_]
    where = pointer(e, 1, space, size * count, "read")
    registers = e.vector(0)
    if len(registers) != count:
        raise e.error(f"expected {count} registers")
    if count == 1:
        return e.assign(registers[0], f"*(const {cpp}*){where}", type_)
    stores = [e.assign(register, f"from[{i}]", type_) for i, register in enumerate(registers)]
    return f"{{ const auto* from = (const {cpp}*){where}; {' '.join(stores)} }}"


@translates("st")
def store(e: Emitter) -> str:
    if e.take("async"):
        return asynchronous_store(e)
    space, count, type_ = memory_modifiers(e)
    e.count(2)
    cpp = CPP_TYPES[type_]
    size = SIZES[type_]
    where = pointer(e, 0, space, size * count, "write")
    values = e.vector(1)
    if len(values) != count:
        raise e.error(f"expected {count} registers")
    # A store of 8 bits takes the low byte of a wider register.
    if count == 1:
        return f"*({cpp}*){where} = {e.read(values[0], type_)};"
    stores = [f"to[{i}] = {e.read(value, type_)};" for i, value in enumerate(values)]
    return f"{{ auto* to = ({cpp}*){where}; {' '.join(stores)} }}"


@translates("prefetch", "prefetchu")
def prefetch(e: Emitter) -> str:
    e.take("global")
    e.need("L1", "L2")
    e.address(0)
    return ";"


ATOMICS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


@translates("atom", "red")
def atomic(e: Emitter) -> str:
    returns = e.instruction.name == "atom"
    e.take("relaxed", "acquire", "release", "acq_rel")
    e.skip(*SCOPES)
    space = e.take("global", "shared", "shared::cta", "shared::cluster")
    operation = e.need(*ATOMICS)
    e.take("noftz")
    type_ = e.type("b32", "b64", "u32", "s32", "u64", "s64", "f32", "f64", "f16x2", "bf16x2")
    place = 1 if returns else 0
    e.count(place + (3 if operation == "cas" else 2))
    where = pointer(e, place, space, SIZES[type_], "atomic")
    values = [e.value(i, type_) for i in range(place + 1, len(e.operands))]
    call = f"atomic_{operation}<{CPP_TYPES[type_]}>({where}, {comma(values)})"
    return e.result(call) if returns else f"{call};"


# Asynchronous copies


@translates("cp")
def asynchronous_copy(e: Emitter) -> str:
    e.need("async")
    if e.take("commit_group"):
        e.count(0)
        return "commit_copies(thread);"
    if e.take("wait_group"):
        e.count(1)
        return f"wait_for_copies(thread, {e.site}, {e.value(0, 'u32')});"
    if e.take("wait_all"):
        e.count(0)
        return f"commit_copies(thread); wait_for_copies(thread, {e.site}, 0);"
    cache = e.need("ca", "cg")
    e.need("shared", "shared::cta")
    e.need("global")
    e.skip("L2::64B", "L2::128B", "L2::256B")
    e.count(3, 4)
    size = int(e.operands[2])
    if size not in ((16,) if cache == "cg" else (4, 8, 16)):
        raise e.error(f"cp.async.{cache} does not copy {size} bytes")
    source_size = e.value(3, "u32") if len(e.operands) == 4 else f"{size}u"
    _, to, to_offset = e.address(0)
    _, source, source_offset = e.address(1)
    return (
        f"copy_async<{size}>(thread, {e.site}, {to} + uint64_t({to_offset}), "
        f"{source} + uint64_t({source_offset}), {source_size});"
    )


# Threads that meet


@translates("bar", "barrier")
def barrier(e: Emitter) -> str:
    if e.take("cluster"):
        return cluster_barrier(e)
    e.take("cta")
    if e.take("warp"):
        e.need("sync")
        e.count(1)
        return f"sync_warp(thread, {e.site}, {e.value(0, 'u32')});"
    operation = e.need("sync", "red", "arrive")
    # bar is barrier.aligned: all threads of a warp come to the same instruction.
    aligned = "true" if e.instruction.name == "bar" or e.take("aligned") else "false"
    if operation == "arrive":
        e.count(2)
        return f"arrive_at_barrier(thread, {e.site}, {e.value(0, 'u32')}, {e.value(1, 'u32')});"
    if operation == "sync":
        e.count(1, 2)
        threads = e.value(1, "u32") if len(e.operands) == 2 else "0"
        return f"sync_block(thread, {e.site}, {aligned}, {e.value(0, 'u32')}, {threads});"
    reduction = e.need("popc", "and", "or")
    e.type("u32" if reduction == "popc" else "pred")
    e.count(3, 4)
    threads = e.value(2, "u32") if len(e.operands) == 4 else "0"
    call = (
        f"count_in_block(thread, {e.site}, {aligned}, {e.value(1, 'u32')}, {threads}, "
        f"{e.value(len(e.operands) - 1, 'pred')})"
    )
    return e.result(
        {"popc": f"{call}.yes", "and": f"{call}.all()", "or": f"{call}.any()"}[reduction]
    )


@translates("shfl")
def shuffle(e: Emitter) -> str:
    e.need("sync")
    mode = e.need("up", "down", "bfly", "idx")
    e.type("b32")
    e.count(5)
    register, *predicate = (name.strip() for name in e.operands[0].split("|"))
    values = comma([e.value(i, "b32") for i in (1, 2, 3, 4)])
    call = f"shuffle_{mode}(thread, {e.site}, {values})"
    if not predicate:
        return e.assign(register, f"{call}.value", "b32")
    code = f"const Shuffled shuffled = {call};"
    code += " " + e.assign(register, "shuffled.value", "b32")
    if predicate:
        code += " " + e.assign(predicate[0], "shuffled.in_range")
    return f"{{ {code} }}"


@translates("vote")
def vote(e: Emitter) -> str:
    e.need("sync")
    kind = e.need("all", "any", "uni", "ballot")
    e.type("b32" if kind == "ballot" else "pred")
    e.count(3)
    return e.result(f"vote_{kind}(thread, {e.site}, {e.value(1, 'pred')}, {e.value(2, 'u32')})")


@translates("match")
def match(e: Emitter) -> str:
    kind = e.need("any", "all")
    e.need("sync")
    type_ = e.type("b32", "b64")
    e.count(3)
    mask, *predicate = (name.strip() for name in e.operands[0].split("|"))
    call = f"match(thread, {e.site}, {e.value(1, type_)}, {e.value(2, 'u32')})"
    if kind == "any":
        return e.assign(mask, call)
    code = f"const uint32_t same = {call}; const bool all = same == {e.value(2, 'u32')};"
    code += " " + e.assign(mask, "all ? same : 0u")
    if predicate:
        code += " " + e.assign(predicate[0], "all")
    return f"{{ {code} }}"


@translates("redux")
def reduce_in_warp(e: Emitter) -> str:
    e.need("sync")
    operation = e.need("add", "min", "max", "and", "or", "xor")
    type_ = e.type("b32" if operation in ("and", "or", "xor") else "u32", "s32", "u32")
    e.count(3)
    values = f"{e.value(1, type_)}, {e.value(2, 'u32')}"
    return e.result(f"reduce_warp(thread, {e.site}, Reduction::{operation}_, {values})", type_)


@translates("activemask")
def active_mask(e: Emitter) -> str:
    e.type("b32")
    # Threads run one at a time: which of them "happen to be together" is for the emulator to say.
    return e.result("(1u << thread.lane)")


@translates("membar", "fence")
def fence(e: Emitter) -> str:
    """Threads run one at a time, each in program order: memory is always up to date."""
    if e.instruction.name == "membar":
        e.need("cta", "gl", "sys")
    else:
        if e.take("mbarrier_init"):
            e.need("release")
        else:
            e.take("sc", "acq_rel")
        e.need(*SCOPES)
    return ";"


# Clusters: blocks that see one another's shared memory


@translates("mapa")
def map_address(e: Emitter) -> str:
    """The same place in the shared memory of another block."""
    if e.take("shared::cluster"):
        e.type("u32")
        e.count(3)
        values = f"{e.value(1, 'u32')}, {e.value(2, 'u32')}"
        return e.result(f"map_shared(thread, {e.site}, {values})", "u32")
    e.type("u64")
    e.count(3)
    values = f"{e.value(1, 'u64')}, {e.value(2, 'u32')}"
    return e.result(f"map_generic(thread, {e.site}, {values})", "u64")


def cluster_barrier(e: Emitter) -> str:
    if e.need("arrive", "wait") == "wait":
        e.take("acquire")
        code = f"wait_for_cluster(thread, {e.site});"
    else:
        releases = "false" if e.take("release", "relaxed") == "relaxed" else "true"
        code = f"arrive_at_cluster(thread, {e.site}, {releases});"
    e.take("aligned")
    e.count(0)
    return code


@translates("mbarrier")
def memory_barrier(e: Emitter) -> str:
    """An object in shared memory that counts arrivals and bytes, and completes phase by phase."""
    operation = e.need("init", "inval", "arrive", "expect_tx", "test_wait", "try_wait")
    expects = operation == "arrive" and bool(e.take("expect_tx"))
    by_parity = operation.endswith("wait") and bool(e.need("parity"))
    releases = "false" if e.take("release", "relaxed", "acquire") == "relaxed" else "true"
    e.skip(*SCOPES)
    remote = ("shared::cluster",) if operation in ("arrive", "expect_tx") else ()
    space = e.take("shared", "shared::cta", *remote)
    e.type("b64")
    place = int(operation in ("arrive", "test_wait", "try_wait"))
    access = "write" if operation in ("init", "inval") else "atomic"
    where = pointer(e, place, space or "shared", 8, access)
    call = f"thread, {e.site}, {where}"
    if operation in ("init", "expect_tx"):
        e.count(2)
        name = "init_mbarrier" if operation == "init" else "expect_bytes"
        return f"{name}({call}, {e.value(1, 'u32')});"
    if operation == "inval":
        e.count(1)
        return f"invalidate_mbarrier({call});"
    if operation == "arrive":
        if e.operands[0] != "_":
            raise e.error("the state of an arrival is not kept: wait by parity")
        e.count(2, 3)
        number = e.value(2, "u32") if len(e.operands) == 3 else "1"
        if expects:
            return f"expect_bytes({call}, {number}); arrive_at_mbarrier({call}, 1, {releases});"
        return f"arrive_at_mbarrier({call}, {number}, {releases});"
    assert by_parity
    e.count(3, 4)  # the fourth: how long to try
    return e.result(f"has_completed({call}, {e.value(2, 'u32')})")


def asynchronous_store(e: Emitter) -> str:
    e.take("weak")
    e.need("shared::cluster")
    e.need("mbarrier::complete_tx::bytes")
    count = int((e.take("v2", "v4") or "v1")[1:])
    type_ = e.type("b32", "b64", "u32", "u64", "s32", "s64", "f32", "f64")
    e.count(3)
    values = e.vector(1)
    if len(values) != count:
        raise e.error(f"expected {count} registers")
    bytes_ = SIZES[type_] * count
    cpp = CPP_TYPES[type_]
    to = pointer(e, 0, "shared::cluster", bytes_, "issue")
    barrier = pointer(e, 2, "shared::cluster", 8, "atomic")
    row = comma([e.read(value, type_) for value in values])
    return (
        f"{{ const {cpp} row[{count}] = {{{row}}}; "
        f"store_async(thread, {e.site}, {to}, row, {bytes_}, {barrier}); }}"
    )


# Matrices

MMA_SHAPES = {
    ("m16n8k16", "bf16"): "Bfloat16, 16",
    ("m16n8k16", "f16"): "Half, 16",
    ("m16n8k8", "bf16"): "Bfloat16, 8",
    ("m16n8k8", "f16"): "Half, 8",
    ("m16n8k8", "tf32"): "Tf32, 8",
    ("m16n8k4", "tf32"): "Tf32, 4",
}


@translates("mma")
def matrix_product(e: Emitter) -> str:
    e.need("sync")
    e.need("aligned")
    shape = e.need("m16n8k16", "m16n8k8", "m16n8k4")
    e.need("row")
    e.need("col")
    e.need("f32")
    element = e.need("bf16", "f16", "tf32")
    e.need(element)
    e.need("f32")
    e.count(4)
    if (shape, element) not in MMA_SHAPES:
        raise e.error(f"there is no {shape} of .{element}")
    a, b = ([e.read(name, "b32") for name in e.vector(i)] for i in (1, 2))
    c = [e.read(name, "f32") for name in e.vector(3)]
    stores = [e.assign(name, f"d[{i}]", "f32") for i, name in enumerate(e.vector(0))]
    return (
        f"{{ float d[4]; multiply_matrices<{MMA_SHAPES[shape, element]}>(thread, {e.site}, d, "
        f"{{{comma(a)}}}, {{{comma(b)}}}, {{{comma(c)}}}); {' '.join(stores)} }}"
    )


@translates("ldmatrix")
def load_matrices(e: Emitter) -> str:
    e.need("sync")
    e.need("aligned")
    e.need("m8n8")
    count = int(e.need("x1", "x2", "x4")[1:])
    transposed = "true" if e.take("trans") else "false"
    e.take("shared", "shared::cta")
    e.type("b16")
    e.count(2)
    registers = e.vector(0)
    if len(registers) != count:
        raise e.error(f"expected {count} registers")
    _, base, offset = e.address(1)
    stores = [e.assign(name, f"rows[{i}]", "b32") for i, name in enumerate(registers)]
    return (
        f"{{ uint32_t rows[{count}]; load_matrices<{count}, {transposed}>(thread, {e.site}, rows, "
        f"{base} + uint64_t({offset})); {' '.join(stores)} }}"
    )


@translates("movmatrix")
def transpose_matrix(e: Emitter) -> str:
    for modifier in ("sync", "aligned", "m8n8", "trans", "b16"):
        e.need(modifier)
    e.count(2)
    return e.result(f"transpose_matrix(thread, {e.site}, {e.value(1, 'b32')})")


# Control


@translates("bra")
def branch(e: Emitter) -> str:
    e.take("uni")
    e.count(1)
    return f"goto {label_name(e.operands[0])};"


@translates("brx")
def indexed_branch(e: Emitter) -> str:
    e.need("idx")
    e.take("uni")
    e.count(2)
    labels = e.names.branch_targets.get(e.operands[1])
    if labels is None:
        raise e.error(f"unknown branch targets {e.operands[1]}")
    cases = " ".join(f"case {i}: goto {label_name(label)};" for i, label in enumerate(labels))
    return f"switch ({e.value(0, 'u32')}) {{ {cases} default: bad_branch(thread, {e.site}); }}"


@translates("call")
def call(e: Emitter) -> str:
    e.take("uni")
    operands = list(e.operands)
    results = operands.pop(0)[1:-1].split(",") if operands[0].startswith("(") else []
    name = operands.pop(0)
    arguments = operands.pop(0)[1:-1].split(",") if operands else []
    if operands or name not in e.names.functions:
        raise e.error(
            f"{name} is no function of this module (printf and assert are not translated)"
        )
    places = []
    for argument in filter(None, (part.strip() for part in (*results, *arguments))):
        if argument not in e.names.addresses:
            raise e.error(f"unknown argument {argument}")
        places.append(e.names.addresses[argument][1])
    return f"{e.names.functions[name]}({comma(['thread', *places])});"


@translates("ret")
def leave_function(e: Emitter) -> str:
    e.take("uni")
    e.count(0)
    return "return;"


@translates("exit")
def leave_kernel(e: Emitter) -> str:
    e.count(0)
    return "exit_thread(thread);"


@translates("trap")
def trap(e: Emitter) -> str:
    e.count(0)
    return f"trap(thread, {e.site});"


@translates("nanosleep")
def sleep(e: Emitter) -> str:
    e.type("u32")
    e.count(1)
    return "yield(thread);"
