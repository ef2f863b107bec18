"""Triton kernels over tiles of the N x K matrix of distances, which is never written.

Each kernel has "outer" points, for which it computes something, and "inner" points, over which it reduces: features and codes,
or codes and features. A program takes OUTER outer points and one of several equal shares ("splits") of the inner points, in
tiles of INNER. What it finds for each outer point goes to row `split` of a (splits, outer_stride) tensor. No program waits for
another and there are no atomics, so that results repeat to the last bit, on any number of multiprocessors.

There are two ways to a tile of squared distances (METHOD):

    "direct"    sum_p (x_p - y_p)^2 from coordinates (DIM, num_points), for narrow codes. Nothing cancels. A tile is
                (INNER, OUTER): every thread holds some outer points and all inner ones, and reduces without its neighbours.
    otherwise   ||x||^2 + ||y||^2 - 2 x.y from rows (num_points, DIM), by tl.dot of this precision, DEPTH coordinates at a
                time. A tile is (OUTER, INNER), as matrix units like it.

ROOT tells whether D is the distance, or its square.

Points are stored with padding up to a multiple of `PADDING` (their stride), and DIM is one of DEPTH. Padded inner points have
the weight `NOTHING`, which is below every score, so that loops need no masks; what comes out for padded outer points is not
used.

Compiled on first use. With TRITON_INTERPRET=1 in the environment before triton is imported, the kernels run on a CPU.
"""
# The language of kernels is not Python's, of which type checkers know.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import math


try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError('solver "fused" needs triton, which comes with torch for GPUs: pip install triton') from error


PADDING = 512
# Scores and squared distances reach 2e37; a sum of one of them and this is finite.
NOTHING = -1e38
_NOTHING = tl.constexpr(NOTHING)
LOG2_E = math.log2(math.e)
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _outer_points(
    x, x_squares, outer, outer_stride, DIM: tl.constexpr, OUTER: tl.constexpr, DEPTH: tl.constexpr, METHOD: tl.constexpr
):
    """What a program keeps of its outer points from tile to tile, as a tuple: coordinates, or squares and one chunk."""
    points = ()
    if METHOD == "direct":
        for p in tl.static_range(DIM):
            points = points + (tl.load(x + p * outer_stride + outer),)
    else:
        points = points + (tl.load(x_squares + outer),)
        if DIM == DEPTH:
            points = points + (tl.load(x + outer[:, None] * DIM + tl.arange(0, DEPTH)[None, :]),)
    return points


@triton.jit
def _squared_distances(
    points,
    x,
    outer,
    y,
    y_squares,
    inner,
    inner_stride,
    DIM: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    METHOD: tl.constexpr,
):
    """(INNER, OUTER) if METHOD is "direct", else (OUTER, INNER)."""
    if METHOD == "direct":
        squares = tl.zeros([INNER, OUTER], tl.float32)
        for p in tl.static_range(DIM):
            difference = tl.load(y + p * inner_stride + inner)[:, None] - points[p][None, :]
            squares += difference * difference
    else:
        products = tl.zeros([OUTER, INNER], tl.float32)
        if DIM == DEPTH:
            chunk = tl.load(y + inner[None, :] * DIM + tl.arange(0, DEPTH)[:, None])
            products = tl.dot(points[1], chunk, products, input_precision=METHOD)
        else:
            for start in range(0, DIM, DEPTH):
                depth = start + tl.arange(0, DEPTH)
                left = tl.load(x + outer[:, None] * DIM + depth[None, :])
                right = tl.load(y + inner[None, :] * DIM + depth[:, None])
                products = tl.dot(left, right, products, input_precision=METHOD)
        squares = points[0][:, None] + tl.load(y_squares + inner)[None, :] - 2 * products
        squares = tl.maximum(squares, 0.0)
    return squares


@triton.jit(do_not_specialize=["num_inner"])
def log_sums_kernel(
    x,
    x_squares,
    y,
    y_squares,
    weights,
    factor,
    maxima,
    sums,
    outer_stride,
    inner_stride,
    num_inner,
    split_size,
    DIM: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    METHOD: tl.constexpr,
    ROOT: tl.constexpr,
):
    """sum_j 2^(w_j - factor D_ij) of a split of the inner points j, as a maximum and the sum of powers below it.

    `weights` (num_inner,) float32 and `factor`, a float32 on the device, are in units of the exponent.
    """
    AXIS: tl.constexpr = 0 if METHOD == "direct" else 1  # of the inner points in a tile
    outer = tl.program_id(0) * OUTER + tl.arange(0, OUTER)
    scale = tl.load(factor)
    points = _outer_points(x, x_squares, outer, outer_stride, DIM, OUTER, DEPTH, METHOD)
    maximum = tl.full([OUTER], _NOTHING, tl.float32)
    total = tl.zeros([OUTER], tl.float32)
    begin = tl.program_id(1) * split_size
    for start in range(begin, tl.minimum(begin + split_size, num_inner), INNER):
        inner = start + tl.arange(0, INNER)
        distances = _squared_distances(
            points, x, outer, y, y_squares, inner, inner_stride, DIM, OUTER, INNER, DEPTH, METHOD
        )
        if ROOT:
            distances = tl.sqrt(distances)
        scores = tl.expand_dims(tl.load(weights + inner), 1 - AXIS) - scale * distances
        new_maximum = tl.maximum(maximum, tl.max(scores, AXIS))
        powers = tl.exp2(scores - tl.expand_dims(new_maximum, AXIS))
        total = total * tl.exp2(maximum - new_maximum) + tl.sum(powers, AXIS)
        maximum = new_maximum
    place = tl.program_id(1).to(tl.int64) * outer_stride + outer
    tl.store(maxima + place, maximum)
    tl.store(sums + place, total)


@triton.jit(do_not_specialize=["num_points", "num_splits"])
def merge_log_sums_kernel(
    maxima, sums, weights, merged, outer_stride, num_points, num_splits, NEGATED: tl.constexpr, BLOCK: tl.constexpr
):
    """w_i + log2 of what all splits sum to, merged in float64, in order; times ln 2, (outer_stride,) float64.

    NEGATED: Without w_i, its negative of base 2 in float32 instead, as weights of the next kernel: NOTHING for padded points.
    """
    outer = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], _NOTHING, tl.float32)
    row = maxima + outer
    for _ in range(num_splits):
        largest = tl.maximum(largest, tl.load(row))
        row += outer_stride
    total = tl.zeros([BLOCK], tl.float64)
    row = maxima + outer
    row_sums = sums + outer
    for _ in range(num_splits):
        power = tl.exp2(tl.load(row) - largest)
        total += tl.load(row_sums).to(tl.float64) * power.to(tl.float64)
        row += outer_stride
        row_sums += outer_stride
    logarithm = largest.to(tl.float64) + tl.log2(total)
    if NEGATED:
        tl.store(merged + outer, tl.where(outer < num_points, -logarithm.to(tl.float32), _NOTHING))
    else:
        tl.store(merged + outer, (logarithm + tl.load(weights + outer).to(tl.float64)) / _LOG2_E)


@triton.jit(do_not_specialize=["num_inner"])
def top_two_kernel(
    x,
    x_squares,
    y,
    y_squares,
    weights,
    factor,
    best,
    index,
    runner_up,
    outer_stride,
    inner_stride,
    num_inner,
    split_size,
    DIM: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    METHOD: tl.constexpr,
    ROOT: tl.constexpr,
):
    """The largest score w_j - factor D_ij of a split of the inner points, its j (int32), and the second largest score."""
    AXIS: tl.constexpr = 0 if METHOD == "direct" else 1
    outer = tl.program_id(0) * OUTER + tl.arange(0, OUTER)
    scale = tl.load(factor)
    points = _outer_points(x, x_squares, outer, outer_stride, DIM, OUTER, DEPTH, METHOD)
    # For every place of a tile at first, and at the end for all places: a tile costs no reduction.
    ROWS: tl.constexpr = OUTER if AXIS else INNER
    COLUMNS: tl.constexpr = INNER if AXIS else OUTER
    first = tl.full([ROWS, COLUMNS], 2 * _NOTHING, tl.float32)
    second = first
    position = tl.zeros_like(first).to(tl.int32)
    begin = tl.program_id(1) * split_size
    for start in range(begin, tl.minimum(begin + split_size, num_inner), INNER):
        inner = start + tl.arange(0, INNER)
        distances = _squared_distances(
            points, x, outer, y, y_squares, inner, inner_stride, DIM, OUTER, INNER, DEPTH, METHOD
        )
        if ROOT:
            distances = tl.sqrt(distances)
        scores = tl.expand_dims(tl.load(weights + inner), 1 - AXIS) - scale * distances
        second = tl.maximum(second, tl.minimum(first, scores))
        position = tl.where(scores > first, start, position)
        first = tl.maximum(first, scores)
    position += tl.expand_dims(tl.arange(0, INNER), 1 - AXIS)
    largest = tl.max(first, AXIS)
    winner = tl.min(tl.where(first == tl.expand_dims(largest, AXIS), position, 2147483647), AXIS)
    second = tl.max(tl.where(position == tl.expand_dims(winner, AXIS), second, first), AXIS)
    place = tl.program_id(1).to(tl.int64) * outer_stride + outer
    tl.store(best + place, largest)
    tl.store(index + place, winner)
    tl.store(runner_up + place, second)


@triton.jit(do_not_specialize=["num_splits"])
def merge_top_two_kernel(
    best, index, runner_up, merged_index, merged_runner_up, outer_stride, num_splits, BLOCK: tl.constexpr
):
    """The index (int64) of the largest score in all splits, the lowest among equals, and the second largest score."""
    outer = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = best + outer
    indices = index + outer
    seconds = runner_up + outer
    first = tl.load(row)
    position = tl.load(indices)
    second = tl.load(seconds)
    for _ in range(1, num_splits):
        row += outer_stride
        indices += outer_stride
        seconds += outer_stride
        score = tl.load(row)
        second = tl.maximum(tl.maximum(second, tl.load(seconds)), tl.minimum(first, score))
        position = tl.where(score > first, tl.load(indices), position)
        first = tl.maximum(first, score)
    tl.store(merged_index + outer, position.to(tl.int64))
    tl.store(merged_runner_up + outer, second)


@triton.jit(do_not_specialize=["num_inner"])
def moments_kernel(
    x,
    x_squares,
    y,
    y_squares,
    weights,
    near_mean,
    nearest,
    sums,
    square_sums,
    outer_stride,
    inner_stride,
    num_inner,
    split_size,
    DIM: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    DEPTH: tl.constexpr,
    METHOD: tl.constexpr,
    ROOT: tl.constexpr,
):
    """The smallest distance, and the sums of D - near_mean and of its square, for a split of the inner points.

    `near_mean` is a float32 on the device. Inner points count where their weight is 0.
    """
    AXIS: tl.constexpr = 0 if METHOD == "direct" else 1
    outer = tl.program_id(0) * OUTER + tl.arange(0, OUTER)
    centre = tl.load(near_mean)
    points = _outer_points(x, x_squares, outer, outer_stride, DIM, OUTER, DEPTH, METHOD)
    smallest = tl.full([OUTER], -_NOTHING, tl.float32)
    total = tl.zeros([OUTER], tl.float32)
    square_total = tl.zeros([OUTER], tl.float32)
    begin = tl.program_id(1) * split_size
    for start in range(begin, tl.minimum(begin + split_size, num_inner), INNER):
        inner = start + tl.arange(0, INNER)
        distances = _squared_distances(
            points, x, outer, y, y_squares, inner, inner_stride, DIM, OUTER, INNER, DEPTH, METHOD
        )
        if ROOT:
            distances = tl.sqrt(distances)
        counts = tl.expand_dims(tl.load(weights + inner) == 0.0, 1 - AXIS)
        smallest = tl.minimum(smallest, tl.min(tl.where(counts, distances, -_NOTHING), AXIS))
        differences = tl.where(counts, distances - centre, 0.0)
        total += tl.sum(differences, AXIS)
        square_total += tl.sum(differences * differences, AXIS)
    place = tl.program_id(1).to(tl.int64) * outer_stride + outer
    tl.store(nearest + place, smallest)
    tl.store(sums + place, total)
    tl.store(square_sums + place, square_total)
