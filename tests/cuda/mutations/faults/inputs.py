"""Faults of what only some problems need: packed sequences, scaling, float32 in parts."""

from .fault import Fault, on_chip

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
            "scores.cuh",
            "p.sizes.rows + at.warp * bytes_of_room",
            "p.sizes.rows + (at.warp ^ 1) * bytes_of_room",
            "bfloat16 on-chip, scaled",
        ),
        (
            "keys scaled before they are there",
            "scores.cuh",
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
        "static_cast<const T*>(done.flags)[head] >= T(done.least)",
        "static_cast<const T*>(done.flags)[head] > T(2)",
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

# float32 in three parts.
IN_PARTS = on_chip(
    (
        "the last part left out",
        "parts.cuh",
        "    x -= taken.x;",
        "    x = part == 1 ? 0.0f : x - taken.x;",
        "float32 on-chip forward",
    ),
    (
        "three products instead of six",
        "parts.cuh",
        "for (int both = kParts<Storage> - 1; both >= 0; --both) {",
        "for (int both = kParts<Storage> > 1; both >= 0; --both) {",
        "float32 on-chip forward",
    ),
    (
        "keys are not centred",
        "rows_in_parts.cuh",
        ": 1.0f;\n      center_eight<S>(factor, column, x);",
        ": 1.0f;",
        "float32 on-chip forward",
    ),
    (
        "all columns centred by the first ones",
        "rows_in_parts.cuh",
        ": 1.0f;\n      center_eight<S>(factor, column, x);",
        ": 1.0f;\n      center_eight<S>(factor, own.column, x);",
        "float32 on-chip forward, deep",
    ),
    (
        "rows beyond the last are read, of float32",
        "rows_in_parts.cuh",
        "valid ? rows.depth - column : 0, x);",
        "rows.depth - column, x);",
        "float32 on-chip forward",
    ),
    (
        "rows of float32 that are not aligned taken for such that are",
        "rows_in_parts.cuh",
        "  if (rows.vectors && left >= 8) {",
        "  if (left >= 8) {",
        "float32 on-chip forward, transposed",
    ),
    (
        "parts of a row in one place",
        "rows_in_parts.cuh",
        "    store_parts(to, p.sizes.part * kElement, x);",
        "    store_parts(to, 16 * kElement, x);",
        "float32 on-chip forward",
    ),
    (
        "the mean taken before all lengths are there",
        "rows_in_parts.cuh",
        "  meet<S>();\n  const float weight",
        "  const float weight",
        "float32 on-chip forward, scaled",
    ),
    (
        "references centred before the mean is there",
        "rows_in_parts.cuh",
        "Center)[column] = sum * weight;\n  }\n  meet<S>();",
        "Center)[column] = sum * weight;\n  }",
        "float32 on-chip forward",
    ),
    (
        "norms of references before they are scaled",
        "rows_in_parts.cuh",
        "    const float factor = terms[j];",
        "    const float factor = 1;",
        "float32 on-chip forward, scaled",
    ),
    (
        "columns beyond the depth stored",
        "rows_in_parts.cuh",
        "if (column + e < columns) to[",
        "to[",
        "float32 on-chip forward",
    ),
    (
        "outputs of float32 stored before all lanes have theirs",
        "averages.cuh",
        "            x[0] * scales[s][i % 2], x[1] * scales[s][i % 2]};\n      }\n    }\n"
        "    __syncwarp();",
        "            x[0] * scales[s][i % 2], x[1] * scales[s][i % 2]};\n      }\n    }",
        "float32 on-chip forward",
    ),
    (
        "later columns of A are the first ones",
        "averages.cuh",
        "operand + band * S::kPairs * 64, bands",
        "operand, bands",
        "float32 on-chip forward, deep",
    ),
    (
        "parts of A in one place",
        "averages.cuh",
        "operand + part * p.sizes.value_bands * S::kPairs * 128 + 64 * half;",
        "operand + part * 128 + 64 * half;",
        "float32 on-chip forward",
    ),
    (
        "parts of A in one place, on shares",
        "share.cuh",
        "to[32 * half + part * tiles * 64] = {",
        "to[32 * half + part * 64] = {",
        "float32 forward on shares",
    ),
    (
        "a share has no mean",
        "share.cuh",
        "  if constexpr (kParts<typename S::Storage> > 1) find_center<S>(p, at);",
        "",
        "float32 forward on shares",
    ),
)
