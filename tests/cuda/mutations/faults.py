"""The seeded faults: in the text of a file of csrc/cuda, `old` becomes `new`."""

from __future__ import annotations

from dataclasses import dataclass

from .seeding import Seeded


@dataclass(frozen=True)
class Fault(Seeded):
    problem: str  # of checks.PROBLEMS: one that reaches the fault

    def apply(self, text: str) -> str:
        """The file with the fault. Later lines keep their numbers, so that kernels that do not
        have it are still known by the emulator's cache."""
        lost_lines = self.old.count("\n") - self.new.count("\n")
        return self.put(text, self.new + "\n" * lost_lines)


def on_chip(*rows: tuple[str, str, str, str, str]) -> tuple[Fault, ...]:
    """Faults of files of csrc/cuda/on_chip, by the fields of Fault."""
    return tuple(Fault(name, f"on_chip/{file}", *rest) for name, file, *rest in rows)


FORWARD = (
    Fault(
        "registers of an mma fragment swapped",
        "product.cuh",
        "multiply_block<Storage>(d, a_part[0], b_part[0][2 * pair], b_part[0][2 * pair + 1]);",
        "multiply_block<Storage>(d, a_part[0], b_part[0][2 * pair + 1], b_part[0][2 * pair]);",
        "bfloat16 small forward",
    ),
    Fault(
        "ldmatrix gives the matrices in another order",
        "product.cuh",
        "(matrix / 2 * 8 + line) * a.pitch + first + matrix % 2 * 8",
        "(matrix % 2 * 8 + line) * a.pitch + first + matrix / 2 * 8",
        "bfloat16 small forward",
    ),
    Fault(
        "low halves of a plan one row off",
        "product.cuh",
        "write_pair(to + Shape<Storage>::kRows * pitch, narrow<Storage>(x - widen(high_x)),",
        "write_pair(to + (Shape<Storage>::kRows + 1) * pitch, narrow<Storage>(x - widen(high_x)),",
        "bfloat16 small forward",
    ),
    Fault(
        "a token too many",
        "tile.cuh",
        "return i < count && (mask.absent() || mask[i * mask_stride]);",
        "return i <= count && (mask.absent() || mask[i * mask_stride]);",
        "bfloat16 small forward",
    ),
    Fault(
        "padding of the references counts",
        "transport.cuh",
        "values[j] = j < p.references ? of(j) : beyond;",
        "values[j] = j < p.references ? of(j) : Accumulate<Storage>(0);",
        "bfloat16 small forward",
    ),
    Fault(
        "mask ignored",
        "tile.cuh",
        "return i < count && (mask.absent() || mask[i * mask_stride]);",
        "return i < count;",
        "bfloat16 small forward",
    ),
    Fault(
        "hidden tokens receive output",
        "forward.cuh",
        "if (!head.tokens.valid(i)) offsets[half] = infinity<T>();",
        "",
        "bfloat16 small forward",
    ),
    Fault(
        "no zeros beyond the depth",
        "tile.cuh",
        "copy_async(to, from, elements * int(sizeof(Storage)));",
        "copy_async(to, from, 16);",
        "bfloat16 small forward",
    ),
    Fault(
        "16-byte copies of rows that are not aligned",
        "tile.cuh",
        "(reinterpret_cast<uintptr_t>(start) % 16) == 0 &&\n"
        "              row_stride % Shape<Storage>::kPerVector == 0;",
        "(reinterpret_cast<uintptr_t>(start) % 16) == 0;",
        "bfloat16 small forward",
    ),
    Fault(
        "element copies ignore the column stride",
        "tile.cuh",
        "from[(column + e) * rows.column_stride] : narrow",
        "from[column + e] : narrow",
        "bfloat16 small forward, transposed",
    ),
    Fault(
        "offset of a head in 32 bits",
        "tile.cuh",
        "b * tensor.stride[0] + h * tensor.stride[1];",
        "b * tensor.stride[0] + int(h * tensor.stride[1]);",
        "bfloat16 small forward, far",
    ),
    Fault(
        "wrong pitch of the tile of values",
        "forward.cuh",
        "stage_rows(rows, tile * S::kRows, first_column, row_tile, operand.pitch);",
        "stage_rows(rows, tile * S::kRows, first_column, row_tile, S::kDepth);",
        "bfloat16 small forward",
    ),
    Fault(
        "resident tiles read before their copies arrive",
        "similarity.cuh",
        "    commit_copies();\n    wait_for_copies<0>();\n#pragma unroll 1",
        "    commit_copies();\n#pragma unroll 1",
        "bfloat16 small forward",
    ),
    Fault(
        "log-sum-exps of warps not merged",
        "transport.cuh",
        "for (int warp = 0; warp < S::kWarps; ++warp) {",
        "for (int warp = 0; warp < 1; ++warp) {",
        "bfloat16 small forward",
    ),
    Fault(
        "A loaded once where it is more than one tile",
        "forward.cuh",
        "loaded = single && parts == 1 && !Scores<Storage, resident>::kLean;",
        "loaded = single;",
        "bfloat16 small forward, wide",
    ),
    Fault(
        "no barrier before A is loaded again",
        "forward.cuh",
        "if (!loaded) __syncthreads();",
        "",
        "bfloat16 small forward, wide",
    ),
    Fault(
        "no __syncwarp between a warp's stores and loads",
        "transport.cuh",
        "  __syncwarp();\n  const int left = rows.depth - first_column;",
        "  const int left = rows.depth - first_column;",
        "bfloat16 small forward",
    ),
    Fault(
        "a row too many written",
        "transport.cuh",
        "if (token >= rows.count || column >= left) continue;",
        "if (token > rows.count || column >= left) continue;",
        "bfloat16 small forward",
    ),
    Fault(
        "scale of float16 plans forgotten",
        "forward.cuh",
        "padded_depth<Storage>(int(p.value_depth), part * S::kDepth), unit / S::kPlanScale);",
        "padded_depth<Storage>(int(p.value_depth), part * S::kDepth), unit);",
        "float16 small forward",
    ),
    Fault(
        "scale of float16 operands forgotten",
        "product.cuh",
        "    scale(unit);\n",
        "\n",
        "float16 small forward",
    ),
    Fault(
        "rows and columns of a product by FMA swapped",
        "product.cuh",
        "accumulators[n][i] += x[i / 2][e] * y[i % 2];",
        "accumulators[n][i] += x[i % 2][e] * y[i / 2];",
        "float32 resident forward",
    ),
    Fault(
        "square norm of the last depth tile alone",
        "tile.cuh",
        "norms[row] = first_column == 0 ? square : norms[row] + square;",
        "norms[row] = square;",
        "bfloat16 streaming forward",
    ),
    Fault(
        "copies of the first tile not committed",
        "similarity.cuh",
        "        commit_copies();\n      }\n      fetched_",
        "        if (ahead) commit_copies();\n      }\n      fetched_",
        "bfloat16 streaming forward",
    ),
    Fault(
        "waits for one group of copies too few",
        "similarity.cuh",
        "      fetched_ = !ends;\n      wait_for_copies<1>();",
        "      fetched_ = !ends;\n      wait_for_copies<2>();",
        "bfloat16 streaming forward",
    ),
    Fault(
        "no barrier between copies and product",
        "similarity.cuh",
        "        __syncthreads();\n      }\n      multiply<false, false, Storage>(",
        "      }\n      multiply<false, false, Storage>(",
        "bfloat16 streaming forward",
    ),
    Fault(
        "no barrier before a buffer is filled again",
        "similarity.cuh",
        "        __syncthreads();\n        held_ = slot_;",
        "        held_ = slot_;",
        "bfloat16 streaming forward",
    ),
    Fault(
        "norms of two tiles in one buffer",
        "similarity.cuh",
        "      parity_ ^= 1;\n",
        "\n",
        "bfloat16 streaming forward",
    ),
    Fault(
        "log-sum-exp of the last block not merged",
        "forward_kernels.cuh",
        "  for (int64_t split = 0; split < share.count; ++split) {\n    const T* from",
        "  for (int64_t split = 0; split + 1 < share.count; ++split) {\n    const T* from",
        "float32 streaming forward",
    ),
    Fault(
        "sums in factors not rescaled when their unit grows",
        "transport.cuh",
        "state.sum = state.sum * kept + factors",
        "state.sum = state.sum + factors",
        "float32 streaming forward",
    ),
    Fault(
        "unit of the factors of references forgotten",
        "forward.cuh",
        "    sums[half].largest = top;\n",
        "    sums[half].largest = 0;\n",
        "float32 streaming forward",
    ),
    Fault(
        "references finished again with each tile of tokens",
        "similarity.cuh",
        "if (of_references) finished_references_ = true;",
        "",
        "float32 streaming forward, shallow",
    ),
    Fault(
        "blocks of a head leave their states in one place",
        "forward.cuh",
        "T* to = head.partials(2) + head.split * 2 * p.references;",
        "T* to = head.partials(2);",
        "bfloat16 streaming forward",
    ),
    Fault(
        "blocks share a tile of tokens",
        "problem.cuh",
        "first_tile = part * parts.tiles_each;",
        "first_tile = part * (parts.tiles_each - 1);",
        "bfloat16 streaming forward",
    ),
    Fault(
        "weights of the last block alone",
        "forward_kernels.cuh",
        "total += from[split * of_share + width];",
        "total = from[split * of_share + width];",
        "bfloat16 streaming forward",
    ),
    Fault(
        "no barrier at the end of a tile of tokens",
        "forward.cuh",
        "    }\n    __syncthreads();\n  }\n  T* scratch",
        "    }\n  }\n  T* scratch",
        "bfloat16 streaming forward",
    ),
)

BACKWARD = (
    Fault(
        "a plan filled again while lanes of its warp read it",
        "backward.cuh",
        "__syncwarp();  // the warp's lanes have read the rows of the plan that the next ones fill",
        "// the warp's lanes have read the rows of the plan that the next ones fill",
        "float32 resident backward, many queries",
    ),
    Fault(
        "sign of an adjoint",
        "backward.cuh",
        "adjoint[half] -= quad_sum(sums[half]) * factors[half];",
        "adjoint[half] += quad_sum(sums[half]) * factors[half];",
        "bfloat16 resident backward",
    ),
    Fault(
        "factor of the gradient of epsilon",
        "gradient_tensors.cuh",
        "quotient(-by_scale * T(kLn2), epsilon);",
        "quotient(-by_scale, epsilon);",
        "float32 resident backward",
    ),
    Fault(
        "gradient of masses of the last step alone",
        "backward.cuh",
        "t == head.p.iterations && is_first ? adjoint[half] : gradient + adjoint[half];",
        "adjoint[half];",
        "float32 resident backward",
    ),
    Fault(
        "gradient of the queries' steps in place of the keys'",
        "gradient_tensors.cuh",
        "by_scale += scalars[(before + split) * 2];",
        "by_scale = scalars[(before + split) * 2];",
        "float32 resident backward",
    ),
    Fault(
        "scale of the collection kept where columns are",
        "problem.cuh",
        "collection_scale = columns + steps_kept(p) * p.references;",
        "collection_scale = columns;",
        "float32 resident backward",
    ),
    Fault(
        "resident heads in different passes share room",
        "problem.cuh",
        "(widest > 0 ? widest : columns)",
        "columns",
        "float32 resident backward",
    ),
    Fault(
        "steps of backward in another unit",
        "gradient.cuh",
        "collected[half] = power_of_two(collected[half] + tops[0]);",
        "collected[half] = power_of_two(collected[half]);",
        "float32 resident backward",
    ),
    Fault(
        "gradient goes where other warps read keys",
        "gradient.cuh",
        "if (!scores.whole_rows()) __syncthreads();  // the keys lie where the gradient goes",
        "",
        "float32 resident backward, deep",
    ),
    Fault(
        "no barrier before rows are staged again",
        "gradient.cuh",
        "        __syncthreads();\n        stage_rows(source,",
        "        stage_rows(source,",
        "bfloat16 streaming backward",
    ),
    Fault(
        "center of the data forgotten",
        "gradient.cuh",
        "if constexpr (!kIsHalf<Storage>) y -= head.center[column];",
        "",
        "float32 resident backward",
    ),
    Fault(
        "tile of references and group of columns swapped",
        "backward_kernels.cuh",
        "int(part / groups),\n                                     int(part % groups));",
        "int(part % groups), int(part / groups));",
        "bfloat16 streaming backward",
    ),
    Fault(
        "sums of the last block lost",
        "backward_kernels.cuh",
        "for (int64_t split = 0; split < share.count; ++split) {\n    sum +=",
        "for (int64_t split = 0; split + 1 < share.count; ++split) {\n    sum +=",
        "float32 streaming backward",
    ),
    Fault(
        "sums of warps not added",
        "transport.cuh",
        "for (int warp = 1; warp < S::kWarps; ++warp) x += scratch[warp * S::kRows + j];",
        "",
        "bfloat16 streaming backward",
    ),
    Fault(
        "blocks of a head leave their scalars in one place",
        "gradient.cuh",
        "head.scalars[head.split * 2] = product_sum;",
        "head.scalars[0] = product_sum;",
        "bfloat16 streaming backward",
    ),
    Fault(
        "stale steps of another tile of references",
        "gradient.cuh",
        "loaded = steps == count && one_chunk;",
        "loaded = steps == count;",
        "float32 streaming backward",
    ),
)

ON_CHIP = on_chip(
    (
        "norm of another token",
        "scores.cuh",
        "const int source = (at.lane & ~3) | at.g / 2;",
        "const int source = (at.lane & ~3) | at.g % 4;",
        "bfloat16 on-chip forward",
    ),
    (
        "norms of the lower tokens are those of the upper ones",
        "scores.cuh",
        "squares[s][1] += __shfl_sync(kFullWarp, at.g % 2 ? lower[3] : lower[2], source);",
        "squares[s][1] += __shfl_sync(kFullWarp, at.g % 2 ? upper[1] : upper[0], source);",
        "bfloat16 on-chip forward",
    ),
    (
        "positions of neighbouring references swapped",
        "scores.cuh",
        "own[e / 2] - (e % 2 ? pair.y : pair.x)",
        "own[e / 2] - (e % 2 ? pair.x : pair.y)",
        "bfloat16 on-chip forward",
    ),
    (
        "more columns than the room has: the first ones again",
        "scores.cuh",
        "if (band > 0) stage<S>(p, at, tokens, shared_head<S>().tokens, 16 * band);",
        "if (band > 0) stage<S>(p, at, tokens, shared_head<S>().tokens, 0);",
        "bfloat16 on-chip forward, deep",
    ),
    (
        "keys read before they are there",
        "scores.cuh",
        "      wait_for_copies<0>();\n",
        "\n",
        "bfloat16 on-chip forward",
    ),
    (
        "rows beyond the last are read",
        "shape.cuh",
        "copy_async(address, from, valid & 1u << i ? 16 : 0);",
        "copy_async(address, from, 16);",
        "bfloat16 on-chip forward",
    ),
    (
        "rows that are not aligned taken for such that are",
        "shape.cuh",
        "const bool whole = rows.vectors && left >= 8;\n  int to",
        "const bool whole = left >= 8;\n  int to",
        "bfloat16 on-chip forward, transposed",
    ),
    (
        "a warp's tokens overlap those of the one before",
        "shape.cuh",
        "    first = 16 * (from + begin);\n",
        "    first = 16 * (from + begin) - (at.warp > 0);\n",
        "bfloat16 on-chip forward",
    ),
    (
        "read before the other lanes have written",
        "shape.cuh",
        "room[32 * h + at.lane] = own[h];\n  __syncwarp();\n",
        "room[32 * h + at.lane] = own[h];\n",
        "bfloat16 on-chip forward, alone",
    ),
    (
        "code without a body, of an older architecture",
        "forward.cuh",
        "launched = ptx_version<kKernel>(stream) >= 80;",
        "launched = true;",
        "bfloat16 on-chip forward, of an older architecture",
    ),
    (
        "sums of the first warp twice",
        "solve.cuh",
        "const Two<Sum> other = room[(warp * S::kLanePairs + h) * 32];",
        "const Two<Sum> other = room[h * 32];",
        "bfloat16 on-chip forward",
    ),
    (
        "one room for the sums of all steps",
        "solve.cuh",
        "marginals.log_largest, entries, t, t & 1, exchange",
        "marginals.log_largest, entries, t, 0, exchange",
        "float16 on-chip forward",
    ),
    (
        "v_0 left in the rows that are kept",
        "solve.cuh",
        "sums[s][half] = logarithm(sums[s][half]) + (scale - solution.log_first);",
        "sums[s][half] = logarithm(sums[s][half]) + scale;",
        "bfloat16 on-chip forward, then backward",
    ),
    (
        "columns kept relative to the largest mass",
        "solve.cuh",
        "const float unit = log_largest + (t > 0 ? solution.log_first : scale);",
        "const float unit = t > 0 ? solution.log_first : scale;",
        "bfloat16 on-chip forward, then backward",
    ),
    (
        "registers of the operand swapped",
        "averages.cuh",
        "operand[64 * half + block % 2] = pack",
        "operand[half + 64 * (block % 2)] = pack",
        "bfloat16 on-chip forward",
    ),
    (
        "one room for the tiles of all blocks of references",
        "averages.cuh",
        "      parity ^= 1;\n",
        "\n",
        "bfloat16 on-chip forward",
    ),
    (
        "plans of float16 scaled once",
        "averages.cuh",
        "for_each_own(at, of_sums, [](int, float& x) { x = 1.0f / kPlanScale<Storage>; });",
        "for_each_own(at, of_sums, [](int, float& x) { x = 1.0f; });",
        "float16 on-chip forward",
    ),
    (
        "A distributed before all of it is there",
        "forward.cuh",
        "        meet<S>();  // all of A is there\n",
        "\n",
        "float16 on-chip forward",
    ),
    (
        "sums of the collection where others read those of the steps",
        "forward.cuh",
        "  meet<S>();  // the sums below",
        "  // the sums below",
        "bfloat16 on-chip forward, in logarithms",
    ),
    (
        "potentials left out of the last plan",
        "forward.cuh",
        "x = power_of_two(x + factors[n][e] - rows[s][half] + kShift);",
        "x = power_of_two(x - rows[s][half] + kShift);",
        "bfloat16 on-chip forward, in logarithms",
    ),
)

ON_CLUSTER = on_chip(
    (
        "blocks of a cluster take the same tokens",
        "shape.cuh",
        "all_strips<S>(), rank<S>() * S::kWarps + at.warp, ranks",
        "all_strips<S>(), at.warp, ranks",
        "bfloat16 forward on a cluster",
    ),
    (
        "blocks of a cluster work on heads of their own",
        "cluster_forward.cuh",
        "attend<S>(p, place(), (first + blockIdx.x) / p.sizes.ranks);",
        "attend<S>(p, place(), first + blockIdx.x);",
        "bfloat16 forward on a cluster",
    ),
    (
        "sums of the last block left out",
        "cluster.cuh",
        "for (int other = 1; other < ranks<S>(); ++other) {",
        "for (int other = 1; other < ranks<S>() - 1; ++other) {",
        "bfloat16 forward on a cluster",
    ),
    (
        "sums read before they have come",
        "cluster.cuh",
        "  receive<S>(exchange);\n  ++exchange.count;\n  const Two<Sum>* own",
        "  ++exchange.count;\n  const Two<Sum>* own",
        "bfloat16 forward on a cluster",
    ),
    (
        "one room for all exchanges",
        "cluster.cuh",
        "uint32_t room() const { return count & 1; }",
        "uint32_t room() const { return 0; }",
        "bfloat16 forward on a cluster",
    ),
    (
        "the phase of an exchange is not told from the one before",
        "cluster.cuh",
        "return count >> 1 & 1;",
        "return 0;",
        "bfloat16 forward on a cluster",
    ),
    (
        "fewer bytes expected than come",
        "cluster.cuh",
        "expect<S>(at, exchange, ranks<S>() * kRow);",
        "expect<S>(at, exchange, kRow);",
        "bfloat16 forward on a cluster",
    ),
    (
        "all sums are sent to the first block",
        "cluster.cuh",
        "address_in(at.warp, shared_address(room + rank<S>() * kRow));",
        "address_in(0, shared_address(room + rank<S>() * kRow));",
        "bfloat16 forward on a cluster",
    ),
    (
        "barriers are used before all blocks know them",
        "cluster.cuh",
        'asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");',
        "",
        "bfloat16 forward on a cluster",
    ),
    (
        "masses relative to the largest of the own block",
        "solve.cuh",
        "if constexpr (S::kClustered) top = most_of_ranks<S>(at, exchange, top);",
        "",
        "bfloat16 forward on a cluster",
    ),
    (
        "the second of two log-sum-exps is sent as the first",
        "cluster.cuh",
        "send(to, barrier, float4{x.x.largest, x.x.sum, x.y.largest, x.y.sum});",
        "send(to, barrier, float4{x.x.largest, x.x.sum, x.x.largest, x.x.sum});",
        "bfloat16 forward on a cluster, in logarithms",
    ),
    (
        "tiles of A are those of the own block",
        "averages.cuh",
        "for (int to = 0; to < ranks<S>(); ++to) {",
        "for (int to = rank<S>(); to == rank<S>(); ++to) {",
        "bfloat16 forward on a cluster, deep",
    ),
    (
        "tiles of all blocks are sent to one place",
        "averages.cuh",
        "const int place = ((rank<S>() * kTiles + at.warp) * 32 + at.lane) * 16;",
        "const int place = ((0 * kTiles + at.warp) * 32 + at.lane) * 16;",
        "float16 forward on a cluster",
    ),
    (
        "columns are stored by a block without them",
        "shape.cuh",
        "return at.warp == 0 && rank<S>() == 0;",
        "return at.warp == 0 && rank<S>() == ranks<S>();",
        "bfloat16 forward on a cluster, then backward",
    ),
)

ON_SHARES = on_chip(
    (
        "all shares begin at the first token",
        "share.cuh",
        "head.first_strip = share < shares.count ? share * shares.each : -1;",
        "head.first_strip = share < shares.count ? 0 : -1;",
        "bfloat16 forward on shares",
    ),
    (
        "a share that does not exist",
        "share.cuh",
        "head.first_strip = share < shares.count ? share * shares.each : -1;",
        "head.first_strip = share * shares.each;",
        "bfloat16 forward on shares, packed",
    ),
    (
        "shares of all heads in one place",
        "share.cuh",
        "+ head.h * shares.count;",
        ";",
        "bfloat16 forward on shares",
    ),
    (
        "shares of packed sequences in one place",
        "share.cuh",
        "b * count : b + tokens_before / (16 * least)",
        "b * count : b",
        "bfloat16 forward on shares, packed",
    ),
    (
        "every share counts as the whole head",
        "share.cuh",
        "const bool alone = head.first_strip == 0 && head.last_strip == all_strips<S>();",
        "const bool alone = true;",
        "bfloat16 forward on shares",
    ),
    (
        "g of the step itself",
        "share.cuh",
        "p.distributes ? p.iterations : p.t > 0 ? p.t - 1 : 0;",
        "p.distributes ? p.iterations : p.t;",
        "bfloat16 forward on shares",
    ),
    (
        "g of the step before for the output",
        "share.cuh",
        "p.distributes ? p.iterations : p.t > 0 ? p.t - 1 : 0;",
        "p.t > 0 ? p.t - 1 : 0;",
        "bfloat16 forward on shares, in parts",
    ),
    (
        "rows without the largest g",
        "share.cuh",
        "solution.log_first = -top;",
        "",
        "bfloat16 forward on one share, then backward",
    ),
    (
        "A without v for the output",
        "share.cuh",
        "if (weighs) x = {",
        "if (false) x = {",
        "bfloat16 forward on shares, in parts",
    ),
    (
        "A with v where plans have it",
        "share.cuh",
        "&& !p.cross && !kFewExponents<Storage>;",
        ";",
        "float16 forward on shares",
    ),
    (
        "halves of a tile of A in one place",
        "share.cuh",
        "to[32 * half] = {words[0], words[1]};",
        "to[0] = {words[0], words[1]};",
        "bfloat16 forward on shares",
    ),
    (
        "A of the parts before is dropped",
        "averages.cuh",
        "average = kept == 0.0f ? x : fmaf(average, kept, x);",
        "average = x;",
        "bfloat16 forward on shares, in parts",
    ),
    (
        "all parts of a share weigh the same",
        "share.cuh",
        "part = part_of(part, both);",
        "part = 1.0f;",
        "bfloat16 forward on shares, in parts",
    ),
    (
        "parts in logarithms weigh the same",
        "share.cuh",
        "kept = part_of(all, both);",
        "kept = 1.0f;",
        "bfloat16 forward on shares, in parts, in logarithms",
    ),
    (
        "sums of a part over those that other warps still read",
        "share.cuh",
        "    parity ^= 1;\n",
        "",
        "bfloat16 forward on shares, in parts, in logarithms",
    ),
    (
        "the first share is not merged",
        "share_forward.cuh",
        "for (int share = lane; share < count; share += 32) all.merge",
        "for (int share = lane + 1; share < count; share += 32) all.merge",
        "bfloat16 forward on shares",
    ),
    (
        "shares weigh the same",
        "share_forward.cuh",
        "const float weight = part_of(*part, column);",
        "const float weight = 1.0f;",
        "bfloat16 forward on shares",
    ),
)

ON_CHIP_BACKWARD = on_chip(
    (
        "slots staged for the round after read as this one's",
        "strip.cuh",
        "((warp * 2 + round % 2) * kSlots + slot)",
        "(warp * 2 * kSlots + slot)",
        "bfloat16 on-chip backward",
    ),
    (
        "hidden rows are copied",
        "strip.cuh",
        "copy_async(address, from, valid & 1u ? 16 : 0);",
        "copy_async(address, from, 16);",
        "bfloat16 on-chip backward",
    ),
    (
        "gradients of tokens beyond the last are written",
        "strip.cuh",
        "min(16, int(rows.count) - first)",
        "16",
        "bfloat16 on-chip backward",
    ),
    (
        "columns that are not neighbours stored as such",
        "shape.cuh",
        "to[e * rows.column_stride] = shared_at<Storage>(from)[e];",
        "to[e] = shared_at<Storage>(from)[e];",
        "bfloat16 on-chip backward, transposed",
    ),
    (
        "what rounding left of A is left out",
        "strip_products.cuh",
        "kElement * (8 * n + part * 16 * S::kPairs) * pitch",
        "kElement * 8 * n * pitch",
        "bfloat16 on-chip backward",
    ),
    (
        "strips of the first warp alone",
        "strip_products.cuh",
        "      rows += 2 * kSlots * slot_bytes(p);\n",
        "\n",
        "bfloat16 on-chip backward",
    ),
    (
        "plans of float16 of another warp's unit",
        "strip_products.cuh",
        "shared_at<float>(StripMemory<S>::kUnitsOfPlans)[warp] : 1.0f",
        "shared_at<float>(StripMemory<S>::kUnitsOfPlans)[0] : 1.0f",
        "float16 on-chip backward",
    ),
    (
        "plans read before all warps have written them",
        "distribution_backward.cuh",
        "             meet<S>();\n             sum_over_tokens<S, false>",
        "\n             sum_over_tokens<S, false>",
        "bfloat16 on-chip backward",
    ),
    (
        "plans written before all warps have read them",
        "distribution_backward.cuh",
        "at, round, 1, groups, sums);\n             meet<S>();\n",
        "at, round, 1, groups, sums);\n\n",
        "bfloat16 on-chip backward",
    ),
    (
        "gbar^T without delta",
        "distribution_backward.cuh",
        "distributed -= totals[j] * (1.0f / kPlanScale<Storage>);",
        "",
        "bfloat16 on-chip backward",
    ),
    (
        "potentials of the step itself",
        "steps_backward.cuh",
        "distribution = power_of_two(potential<S>(p, t - 1, j));",
        "distribution = power_of_two(potential<S>(p, t, j));",
        "bfloat16 on-chip backward",
    ),
    (
        "eta on the side that does not collect",
        "steps_backward.cuh",
        "if (gradients.collects) adjoint +=",
        "adjoint +=",
        "bfloat16 on-chip backward",
    ),
    (
        "rows of float16 not divided by their largest",
        "steps_backward.cuh",
        "units[half] *= top * (1.0f / kPlanScale<Storage>);",
        "units[half] *= 1.0f / kPlanScale<Storage>;",
        "float16 on-chip backward, alone",
    ),
    (
        "gradients of masses of the first step alone",
        "steps_backward.cuh",
        "gradient = t == last ? adjoint : gradient + adjoint;",
        "gradient = adjoint;",
        "bfloat16 on-chip backward",
    ),
    (
        "flows of the last step for those before",
        "similarity_backward.cuh",
        "    if (t > 1) {\n",
        "    if (t > 2) {\n",
        "bfloat16 on-chip backward",
    ),
    (
        "dy of the keys in place of that of the queries",
        "similarity_backward.cuh",
        "gradient = accumulate ? gradient + x : x;",
        "gradient = x;",
        "bfloat16 on-chip backward",
    ),
    (
        "queries have the keys' masses",
        "backward.cuh",
        "head.select(p, first + blockIdx.x, of_queries);",
        "head.select(p, first + blockIdx.x, false);",
        "bfloat16 on-chip backward",
    ),
)

IN_GROUP = tuple(
    Fault(name, file, old, new, "float32 streaming backward, in a group")
    for name, file, old, new in (
        (
            "first part of a block's sums left out",
            "backward_kernels.cuh",
            "for (int64_t split = 0; split < splits; ++split) sum += of_head[split * numbers];",
            "for (int64_t split = 1; split < splits; ++split) sum += of_head[split * numbers];",
        ),
        (
            "scale replaced before all have read it",
            "merge_ranks.cuh",
            "  const T factor = inverse(scale);\n",
            "  const T factor = inverse(scale); if (threadIdx.x % 32 == 0) scale = factor;\n",
        ),
    )
)

PACKED = tuple(
    Fault(name, file, old, new, problem)
    for name, file, old, new, problem in (
        (
            "every packed sequence begins with the first",
            "problem.cuh",
            "return {first, first, found, valid};",
            "return {0, first, found, valid};",
            "bfloat16 on-chip backward, packed",
        ),
        (
            "normalisers of packed sequences in the place of the first one's",
            "problem.cuh",
            "return {first, first, found, valid};",
            "return {first, 0, found, valid};",
            "float32 resident backward, packed",
        ),
        (
            "every packed sequence has the positions of the first",
            "problem.cuh",
            "span.before * position_stride",
            "0 * position_stride",
            "float32 resident backward, packed",
        ),
        (
            "a packed sequence has the mass gradients of the next",
            "gradient_tensors.cuh",
            "span.start * p.grad_token_mass.stride[0] +",
            "(span.start + span.count) * p.grad_token_mass.stride[0] +",
            "bfloat16 on-chip backward, packed",
        ),
        (
            "packed sequences share the room of their blocks' sums",
            "problem.cuh",
            "p.heads * (samples + (tokens",
            "p.heads * (0 + (tokens",
            "float32 streaming backward, packed",
        ),
        (
            "blocks that a short packed sequence does not need compute it",
            "launch.cuh",
            "    return head.split < head.splits;",
            "    return true;",
            "float32 streaming backward, packed",
        ),
    )
)

# Scaling to unit length.
SCALED = (
    *on_chip(
        (
            "keys as they are",
            "forward.cuh",
            "    if (p.normalize) scale_tokens",
            "    if (false) scale_tokens",
            "bfloat16 on-chip, scaled",
        ),
        (
            "keys of a cluster as they are",
            "forward.cuh",
            "    if (p.normalize) scale_tokens",
            "    if (p.normalize && !S::kClustered) scale_tokens",
            "bfloat16 forward on a cluster, scaled",
        ),
        (
            "a warp scales the room of the next one",
            "forward.cuh",
            "p.sizes.rows + at.warp * bytes_of_room",
            "p.sizes.rows + (at.warp ^ 1) * bytes_of_room",
            "bfloat16 on-chip, scaled",
        ),
        (
            "keys scaled before they are there",
            "forward.cuh",
            "p.sizes.pitch * kElement;\n  wait_for_copies<0>();",
            "p.sizes.pitch * kElement;",
            "bfloat16 on-chip, scaled",
        ),
        (
            "keys of backward as they are",
            "sweep.cuh",
            "      if (p.normalize) {",
            "      if (false) {",
            "bfloat16 on-chip backward, scaled",
        ),
        (
            "norms of scaled references are those before",
            "scores.cuh",
            "      square = square_of_row(square, true);\n    }",
            "      square = square_of_row(square, true) / (factor * factor);\n    }",
            "bfloat16 on-chip backward, scaled",
        ),
        (
            "the length of half a row",
            "unit_length.cuh",
            "if (is_short) square += __shfl_xor_sync(kFullWarp, square, 16);",
            "",
            "bfloat16 on-chip, scaled",
        ),
        (
            "the length of half a long row",
            "unit_length.cuh",
            "square += __shfl_xor_sync(kFullWarp, square, is_short ? 8 : 4);",
            "if (is_short) square += __shfl_xor_sync(kFullWarp, square, 8);",
            "bfloat16 on-chip backward, scaled, long rows",
        ),
        (
            "gradients along the keys",
            "similarity_backward.cuh",
            "      products[half] = quad_sum(products[half]);",
            "      products[half] = 0;",
            "bfloat16 on-chip backward, scaled",
        ),
        (
            "a lane's columns for all of a row",
            "similarity_backward.cuh",
            "      products[half] = quad_sum(products[half]);",
            "",
            "bfloat16 on-chip backward, scaled",
        ),
        (
            "the length of another token",
            "similarity_backward.cuh",
            "factors[half] = lengths[8 * half];",
            "factors[half] = lengths[0];",
            "bfloat16 on-chip backward, scaled",
        ),
        (
            "gradients along the references",
            "similarity_backward.cuh",
            "along = p.normalize ? product : 0.0f;",
            "along = 0.0f;",
            "bfloat16 on-chip backward, scaled",
        ),
        (
            "gradients of scaled references",
            "similarity_backward.cuh",
            "return inverse_length(lanes_sum<32>(square));",
            "return 1.0f;",
            "bfloat16 on-chip backward, scaled, long rows",
        ),
    ),
    Fault(
        "gradients of heads that are done scaled again",
        "unit_length.cuh",
        "static_cast<const T*>(done.flags)[head] != T(0)",
        "static_cast<const T*>(done.flags)[head] == T(2)",
        "bfloat16 on-chip backward, scaled",
    ),
    Fault(
        "every second row as it is",
        "unit_length.cuh",
        "i += kMergeThreads / 32) {",
        "i += kMergeThreads / 16) {",
        "float32 streaming backward, scaled",
    ),
    Fault(
        "rows of the head's first block in all blocks",
        "unit_length.cuh",
        "begin = index % parts * kRowsOfBlock;",
        "begin = 0;",
        "float32 streaming backward, scaled, many tokens",
    ),
)

FAULTS = (
    FORWARD
    + ON_CHIP
    + ON_CLUSTER
    + ON_SHARES
    + BACKWARD
    + ON_CHIP_BACKWARD
    + SCALED
    + IN_GROUP
    + PACKED
)
