"""SetAttention, the Nystrom features and the parts of sequences and grids."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from setformer_ext import SetAttention
from setformer_ext import reference as definition
from setformer_ext.cli.selftest.problems import generator, random_mask
from setformer_ext.layout import average_parts, centres, nearly_square
from setformer_ext.nystrom import _InverseSquareRoot, nystrom_features

OPTIONS = {
    "default": {},
    "uniform masses": {"learned_token_mass": False, "learned_reference_mass": False},
    "adaptive reference mass": {"adaptive_reference_mass": True, "iterations": 1},
    "pooled references": {"pooled_references": True},
    "queries are keys": {"query_projection": False},
    "bandwidth, epsilon": {"bandwidth": 0.6, "epsilon": 0.2},
    "linear": {"kernel": "linear", "bias": False},
    "nystrom": {"num_anchors": 5},
    "positions": {"position_bandwidth": 0.5},
    "no iterations": {"iterations": 0},
    "everything": {
        "bandwidth": 0.6,
        "epsilon": 0.2,
        "num_anchors": 5,
        "position_bandwidth": 0.5,
        "pooled_references": True,
        "adaptive_reference_mass": True,
    },
}
# With positions, padding counts as part of the sequence.
PADDING_CHANGES_NOTHING = [n for n, o in OPTIONS.items() if "position_bandwidth" not in o]


def make(name: str, dim: int = 24, heads: int = 3, references: int = 7) -> SetAttention:
    """A module whose parameters are all away from where they start, in float64."""
    torch.manual_seed(0)
    module = SetAttention(dim, heads, references, **OPTIONS[name]).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("B", "N"), [(1, 1), (2, 35), (3, 4), (0, 5), (2, 0)])
def test_shape_and_dtype(name: str, B: int, N: int) -> None:
    output = make(name)(tokens(B, N, 24))
    assert output.shape == (B, N, 24)
    assert output.dtype == torch.float64
    assert output.isfinite().all()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("grid", [None, (5, 7)])
def test_gradients_reach_every_parameter(name: str, grid: tuple[int, int] | None) -> None:
    module, x = make(name), tokens(2, 35, 24).requires_grad_()
    module(x, grid=grid).square().sum().backward()
    for parameter_name, parameter in [("x", x), *module.named_parameters()]:
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        if (name, parameter_name) == ("no iterations", "reference_log_mass"):
            assert (parameter.grad == 0).all()  # T = 0: the reference mass plays no part
        else:
            assert parameter.grad.abs().max() > 1e-6, parameter_name


@pytest.mark.parametrize("name", ["default", "everything"])
def test_gradients_agree_with_finite_differences(name: str) -> None:
    module, x = make(name, dim=4, heads=2, references=3), tokens(1, 5, 4)
    mask = torch.tensor([[True, False, True, True, True]])
    names, values = zip(*module.named_parameters(), strict=True)

    def call(*values: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(module, parameters, (x, mask))

    assert torch.autograd.gradcheck(call, values, fast_mode=True)


@pytest.mark.parametrize("name", PADDING_CHANGES_NOTHING)
@pytest.mark.parametrize("padding", [0.0, math.nan])
def test_padded_equals_unpadded(name: str, padding: float) -> None:
    module, x = make(name), tokens(2, 19, 24)
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0, 11:] = mask[1, :3] = False
    x = x.where(mask.unsqueeze(-1), padding).requires_grad_()
    output = module(x, mask)
    short = module(x[:1, :11]), module(x[1:, 3:])
    torch.testing.assert_close(output[:1, :11], short[0])
    torch.testing.assert_close(output[1:, 3:], short[1])
    assert (output[~mask] == 0).all()
    output.square().sum().backward()
    assert (x.grad[~mask] == 0).all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_masked_grid_and_masked_sample_are_finite() -> None:
    module, x = make("everything"), tokens(2, 35, 24)
    mask = torch.zeros(2, 35, dtype=torch.bool)
    mask[0, 4:9] = True
    output = module(x, mask, grid=(5, 7))
    assert output.isfinite().all()
    assert (output[1] == 0).all()


@pytest.mark.parametrize("name", ["default", "uniform masses", "queries are keys", "nystrom"])
def test_permuted_tokens_permute_the_output(name: str) -> None:
    module, x = make(name), tokens(2, 17, 24)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x[:, order]), module(x)[:, order])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grid", [None, (5, 7)])
@pytest.mark.parametrize("name", OPTIONS)
def test_is_the_definition_on_its_own_projections(
    name: str, grid: tuple[int, int] | None, masked: bool
) -> None:
    """The whole of the module, written out; six references are 2 x 3 parts of a grid."""
    module, x, options = make(name, references=6), tokens(2, 35, 24), OPTIONS[name]
    place = torch.arange(35)
    mask = torch.stack([place % 3 > 0, place < 20]) if masked else None
    valid = torch.ones(2, 35, dtype=torch.bool) if mask is None else mask
    weight = valid.double().unsqueeze(-1)
    kernel = {key: options[key] for key in ("kernel", "bandwidth") if key in options}
    if module.num_anchors is not None:
        kernel = {"kernel": "linear"}

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.unflatten(-1, (3, 8)).transpose(1, 2)

    def points(y: torch.Tensor) -> torch.Tensor:
        y = F.normalize(y, dim=-1)
        if module.num_anchors is None:
            return y
        anchor, scale = F.normalize(module.anchor, dim=-1), 2 * options.get("bandwidth", 1.0) ** 2
        # Of any root R of kappa(W, W) the products of kappa(y, W) R^-T are the approximation.
        root = torch.linalg.cholesky((-torch.cdist(anchor, anchor).square() / scale).exp())
        of_y = (-torch.cdist(y, anchor).square() / scale).exp()
        return torch.linalg.solve_triangular(root, of_y.mT, upper=False).mT

    if not module.pooled_references:
        reference = points(module.reference)
    elif grid is None:
        parts = [F.adaptive_avg_pool1d(y[keep].T, 6).T for y, keep in zip(x, valid, strict=True)]
        reference = points(heads(module.key(torch.stack(parts))))
    else:
        sums, shares = (
            F.adaptive_avg_pool2d(y.mT.unflatten(-1, grid), (2, 3)).flatten(2).mT
            for y in (x * weight, weight)
        )
        reference = points(heads(module.key(sums / shares)))
    token_mass = reference_mass = query = None
    if options.get("learned_token_mass", True):
        token_mass = module.token_mass(x).exp().transpose(1, 2)
    if options.get("learned_reference_mass", True):
        logits = module.reference_log_mass
        if options.get("adaptive_reference_mass", False):
            mean = (x * weight).sum(1) / weight.sum(1)
            logits = logits + module.reference_mass(mean).unflatten(-1, (3, 6))
        reference_mass = logits.exp()
    positions = {}
    if "position_bandwidth" in options:
        positions = {
            "token_positions": centres(grid or (35,), x),
            "reference_positions": centres((2, 3) if grid else (6,), x),
            "position_bandwidth": options["position_bandwidth"],
        }
    key = points(heads(module.key(x)))
    if options.get("query_projection", True):
        query = points(heads(module.query(x)))
    output = definition.set_attention(
        query,
        key,
        heads(module.value(x)),
        reference,
        mask=mask,
        query_mask=mask,
        query_positions=positions.get("token_positions"),
        token_mass=token_mass,
        reference_mass=reference_mass,
        epsilon=options.get("epsilon", 0.04),
        iterations=options.get("iterations", 1),
        normalize=False,
        **kernel,
        **positions,
    )
    expected = module.projection(output.transpose(1, 2).flatten(-2)) * weight
    torch.testing.assert_close(module(x, mask, grid), expected)


def test_plan_has_the_masses_as_marginals() -> None:
    module, x = make("default"), tokens(2, 35, 24)
    module.iterations = 200
    plan = module.transport_plan(x)
    assert plan.shape == (2, 3, 35, 7)
    torch.testing.assert_close(plan.sum(-2), module.reference_log_mass.softmax(-1).expand(2, 3, 7))
    token_mass = module.token_mass(x).softmax(1).transpose(1, 2)
    torch.testing.assert_close(plan.sum(-1), token_mass, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_queries_start_as_keys_and_learn_on_their_own(bias: bool) -> None:
    torch.manual_seed(0)
    module, x = SetAttention(24, 3, 7, bias=bias).double(), tokens(2, 19, 24)
    shared = SetAttention(24, 3, 7, bias=bias, query_projection=False).double()
    own = module.state_dict()
    shared.load_state_dict({name: x for name, x in own.items() if not name.startswith("query.")})
    torch.testing.assert_close(module(x), shared(x))
    module(x).square().sum().backward()
    for query, key in zip(module.query.parameters(), module.key.parameters(), strict=True):
        assert query is not key
        assert not torch.equal(query.grad, key.grad)
    other = SetAttention(24, 3, 7, context_dim=10)
    assert other.query.weight.shape != other.key.weight.shape
    assert other.query.weight.std() > 0


def test_masses_start_uniform() -> None:
    module = SetAttention(24, 3, 7, iterations=200).double()
    plan = module.transport_plan(tokens(2, 35, 24))
    torch.testing.assert_close(plan.sum(-1), torch.full_like(plan[..., 0], 1 / 35))
    torch.testing.assert_close(plan.sum(-2), torch.full_like(plan[..., 0, :], 1 / 7))


def test_huge_token_logits_stay_finite() -> None:
    module, x = make("default"), tokens(2, 35, 24).requires_grad_()
    nn.init.constant_(module.token_mass.weight, 1e4)
    output = module(x)
    output.square().sum().backward()
    assert output.isfinite().all()
    assert x.grad.isfinite().all()


def test_one_dominant_token_of_many_fits_half_precision() -> None:
    """Its mass is N, more than the largest float16."""
    module = SetAttention(2, 1, 2, iterations=2).half()
    nn.init.constant_(module.token_mass.weight, 100.0)
    x = torch.zeros(1, 70_000, 2, dtype=torch.float16)
    x[:, 5] = 1
    x.requires_grad_()
    output = module(x)
    output.float().mean().backward()
    assert output.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_tokens_with_zero_keys_stay_finite_in_half_precision() -> None:
    """As masked ones are where the key has no bias."""
    module = SetAttention(24, 3, num_anchors=5, bias=False).half()
    x = tokens(2, 35, 24).half()
    x[:, 4] = 0
    x.requires_grad_()
    mask = torch.ones(2, 35, dtype=torch.bool)
    mask[1, 3:9] = False
    output = module(x, mask)
    output.float().sum().backward()
    assert output.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("masses", ["token_mass", "reference_mass"])
def test_masses_are_computed_in_float32_at_least(
    masses: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from setformer_ext import modules

    given = {}
    monkeypatch.setattr(
        modules, "set_attention", lambda *_, **options: given.update(options) or _[2]
    )
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        make("default").to(dtype)(tokens(2, 35, 24).to(dtype))
        assert given[masses].dtype == expected


def test_position_penalty_makes_references_local() -> None:
    """With a narrow penalty each reference draws most mass from its own part of the grid."""
    module = SetAttention(24, 3, 4, position_bandwidth=0.2, epsilon=0.02).double()
    plan = module.transport_plan(tokens(2, 64, 24), grid=(8, 8)).unflatten(2, (8, 8))
    quarters = plan.unflatten(3, (2, 4)).unflatten(2, (2, 4)).sum((3, 5)).flatten(2, 3)
    drawn = quarters.diagonal(dim1=-2, dim2=-1) / quarters.sum(-2)
    assert drawn.min() > 0.8


def test_grid_matters_only_to_positions_and_pooled_references() -> None:
    x = tokens(2, 36, 24)
    torch.testing.assert_close(make("default")(x, grid=(6, 6)), make("default")(x))
    for name in ("positions", "pooled references"):
        assert not torch.allclose(make(name)(x, grid=(6, 6)), make(name)(x))


def test_centres() -> None:
    like = torch.zeros(())
    assert torch.equal(centres((4,), like), torch.tensor([[0.125], [0.375], [0.625], [0.875]]))
    expected = torch.tensor([[0.25, 1 / 6], [0.25, 0.5], [0.25, 5 / 6],
                             [0.75, 1 / 6], [0.75, 0.5], [0.75, 5 / 6]])  # fmt: skip
    torch.testing.assert_close(centres((2, 3), like), expected)
    long = centres((3136,), like.bfloat16()).flatten()
    assert (long.diff() > 0).all()


@pytest.mark.parametrize(
    ("count", "shape"), [(1, (1, 1)), (7, (1, 7)), (12, (3, 4)), (49, (7, 7)), (50, (5, 10))]
)
def test_nearly_square(count: int, shape: tuple[int, int]) -> None:
    assert nearly_square(count) == shape


@pytest.mark.parametrize("N", [1, 6, 7, 19])
@pytest.mark.parametrize("count", [1, 6, 20])
def test_average_parts_is_adaptive_average_pooling(N: int, count: int) -> None:
    x = tokens(2, N, 3)
    expected = F.adaptive_avg_pool1d(x.mT, count).mT
    torch.testing.assert_close(average_parts(x, count), expected)
    padded = torch.cat([tokens(2, 4, 3, seed=2), x, tokens(2, 3, 3, seed=3)], dim=1)
    mask = torch.zeros(padded.shape[:2], dtype=torch.bool)
    mask[:, 4 : 4 + N] = True
    torch.testing.assert_close(average_parts(padded, count, mask), expected)


@pytest.mark.parametrize("grid", [(5, 7), (2, 9)])
def test_average_parts_of_a_grid_is_adaptive_average_pooling(grid: tuple[int, int]) -> None:
    x = tokens(2, math.prod(grid), 3)
    pooled = F.adaptive_avg_pool2d(x.mT.unflatten(-1, grid), (3, 4)).flatten(2).mT
    torch.testing.assert_close(average_parts(x, 12, grid=grid), pooled)
    every_other = (torch.arange(math.prod(grid)) % 2 == 0).expand(2, -1)
    twice = average_parts(torch.cat([x, x + 1], -1), 12, every_other, grid)
    torch.testing.assert_close(twice[..., 3:] - twice[..., :3], torch.ones_like(pooled))


@pytest.mark.parametrize("grid", [None, (64, 256)])
@pytest.mark.parametrize("masked", [False, True])
def test_average_parts_stores_no_token_by_part_matrix(
    grid: tuple[int, int] | None, masked: bool
) -> None:
    """The largest tensor it makes is a few times the input, and far from count * N."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor):
                self.numbers = max(self.numbers, result.numel())
            return result

    N, count = 64 * 256, 1024
    mask = torch.arange(N).expand(1, -1) % 3 > 0 if masked else None
    with Largest() as largest:
        average_parts(tokens(1, N, 4), count, mask, grid)
    assert largest.numbers <= 6 * N * 4 < count * N / 8


def test_nystrom_features_are_exact_at_the_anchors() -> None:
    anchor, x = F.normalize(tokens(3, 6, 8), dim=-1), tokens(2, 3, 35, 8, seed=2)
    bandwidth = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    of_anchors = nystrom_features(anchor.unsqueeze(0), anchor, bandwidth)
    of_x = nystrom_features(x, anchor, bandwidth)
    kernel = definition.similarity(x, anchor, "gaussian", bandwidth)
    torch.testing.assert_close(of_x @ of_anchors.mT, kernel, rtol=1e-6, atol=1e-6)
    assert of_x.norm(dim=-1).max() <= 1 + 1e-6  # kappa(x, x) = 1 from below


def test_nystrom_features_approximate_the_kernel_better_with_more_anchors() -> None:
    x = F.normalize(tokens(1, 1, 50, 3), dim=-1)
    kernel = definition.similarity(x, x[0])
    anchors = F.normalize(tokens(1, 32, 3, seed=5), dim=-1)
    errors = []
    for count in (2, 8, 32):
        feature = nystrom_features(x, anchors[:, :count])
        errors.append(float((feature @ feature.mT - kernel).abs().max()))
    assert errors[0] > errors[1] > 30 * errors[2]
    assert errors[2] < 0.02


def test_nystrom_attention_equals_gaussian_where_references_are_anchors() -> None:
    plain, nystrom = make("default"), SetAttention(24, 3, 7, num_anchors=7).double()
    nystrom.load_state_dict(plain.state_dict() | {"anchor": plain.reference})
    x = tokens(2, 19, 24)
    torch.testing.assert_close(nystrom(x), plain(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [2, 6])
def test_coinciding_or_distant_anchors_have_finite_gradients(count: int) -> None:
    """Equal eigenvalues, where the derivative of eigh itself divides by zero."""
    together = torch.ones(1, count, 8)
    apart = 10 * torch.eye(8)[:count].unsqueeze(0)
    for anchor in (together, apart):
        anchor.requires_grad_()
        feature = nystrom_features(tokens(1, 1, 9, 8).float(), anchor)
        feature.square().sum().backward()
        assert feature.isfinite().all()
        assert anchor.grad.isfinite().all()


@pytest.mark.parametrize("floor", [1e-3, 1.5])
def test_inverse_square_root_derivatives(floor: float) -> None:
    """Below, and among the eigenvalues; both derivatives against finite differences."""
    factor = tokens(2, 5, 5)
    matrix = factor @ factor.mT + 0.5 * torch.eye(5)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert (eigenvalues > 1.5).any()
    assert (eigenvalues < 1.5).any()

    def root(matrix: torch.Tensor) -> torch.Tensor:
        return _InverseSquareRoot.apply((matrix + matrix.mT) / 2, matrix.new_full((), floor))

    assert torch.autograd.gradcheck(root, matrix.requires_grad_())
    assert torch.autograd.gradgradcheck(root, matrix)


@pytest.mark.parametrize("name", OPTIONS)
def test_functional_gradients_are_those_of_backward(name: str) -> None:
    module, x = make(name), tokens(3, 19, 24)
    parameters = {n: p.detach() for n, p in module.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    gradients = torch.func.grad(loss)(parameters, x)
    loss(dict(module.named_parameters()), x).backward()
    for n, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[n], parameter.grad, msg=n)
    of_samples = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.unsqueeze(1))
    for n, gradient in of_samples.items():
        torch.testing.assert_close(gradient.sum(0), gradients[n], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", OPTIONS)
def test_state_dict_round_trip(name: str) -> None:
    module, other = make(name), SetAttention(24, 3, 7, **OPTIONS[name]).double()
    assert set(module.state_dict()) == {n for n, _ in module.named_parameters()}
    other.load_state_dict(module.state_dict())
    x = tokens(2, 19, 24)
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_reset_parameters_draws_again_from_the_seed() -> None:
    module = SetAttention(24, 3, num_anchors=5)
    for parameter in module.parameters():
        nn.init.constant_(parameter, 7.0)
    fresh = SetAttention(24, 3, num_anchors=5)
    for each in (module, fresh):
        torch.manual_seed(3)
        each.reset_parameters()
    for name, parameter in fresh.state_dict().items():
        assert torch.equal(module.state_dict()[name], parameter), name


@pytest.mark.slow
@pytest.mark.parametrize(
    # The fusions of inductor are torch's own, and those of all options take most of a minute.
    ("name", "compiler"),
    [("default", "inductor"), ("everything", "aot_eager")],
)
def test_compiles_to_one_graph(name: str, compiler: str) -> None:
    module, x = make(name).float(), tokens(2, 35, 24).float().requires_grad_()
    mask = random_mask(generator(0), 2, 35)
    grid = (5, 7) if name == "everything" else None
    expected = module(x, mask, grid)
    expected.square().sum().backward()
    expected_gradient, x.grad = x.grad, None
    output = torch.compile(module, fullgraph=True, backend=compiler)(x, mask, grid)
    output.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, expected_gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "everything"])
def test_compiles_for_any_length(name: str) -> None:
    module = make(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for N in (19, 35):
        x = tokens(2, N, 24)
        torch.testing.assert_close(compiled(x), module(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["default", "everything"])
def test_exports_for_any_length(name: str) -> None:
    module, x = make(name), tokens(2, 35, 24)
    mask = torch.ones(2, 35, dtype=torch.bool)
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = ({1: length}, {1: length})
    exported = torch.export.export(module, (x, mask), dynamic_shapes=shapes).module()
    longer = tokens(2, 51, 24)
    mask = random_mask(generator(0), 2, 51)
    torch.testing.assert_close(exported(longer, mask), module(longer, mask))


@pytest.mark.parametrize("name", OPTIONS)
def test_bfloat16_autocast_and_module(name: str) -> None:
    module, x = make(name).float(), tokens(2, 35, 24).float()
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    scale = exact.abs().max()
    assert (output - exact).abs().max() < 0.1 * scale
    output.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    low = module.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low - exact).abs().max() < 0.1 * scale


def test_repr_tells_the_options() -> None:
    text = repr(SetAttention(24, 3, 7, epsilon=0.07, position_bandwidth=0.5))
    for part in ("24", "num_heads=3", "num_references=7", "epsilon=0.07", "0.5"):
        assert part in text
    assert "learned_" not in text
    uniform = repr(SetAttention(24, 3, learned_token_mass=False, learned_reference_mass=False))
    assert "learned_token_mass=False, learned_reference_mass=False" in uniform


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_heads", 0),
        ("num_heads", 5),
        ("num_references", 0),
        ("kernel", "cosine"),
        ("bandwidth", 0.0),
        ("bandwidth", math.inf),
        ("epsilon", -1.0),
        ("epsilon", math.nan),
        ("iterations", -1),
        ("num_anchors", 0),
        ("position_bandwidth", 0.0),
    ],
)
def test_constructor_names_the_bad_argument(name: str, value: object) -> None:
    culprit = "dim" if (name, value) == ("num_heads", 5) else name
    with pytest.raises(ValueError, match=rf"SetAttention: {culprit} must be .*got "):
        SetAttention(**{"dim": 24, "num_heads": 3, name: value})


def test_linear_kernel_has_no_anchors() -> None:
    with pytest.raises(ValueError, match="num_anchors must be None with kernel='linear', got 5"):
        SetAttention(24, 3, kernel="linear", num_anchors=5)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dim", 8.0, "an int, got float"),
        ("num_heads", "2", "an int, got str"),
        ("num_references", None, "an int, got NoneType"),
        ("iterations", 2.5, "an int, got float"),
        ("iterations", True, "an int, got bool"),
        ("num_anchors", 3.0, "an int or None, got float"),
        ("bandwidth", "1", "a number, got str"),
        ("epsilon", None, "a number, got NoneType"),
        ("epsilon", True, "a number, got bool"),
        ("position_bandwidth", [0.5], "a number or None, got list"),
        ("kernel", None, "a string, got NoneType"),
        ("pooled_references", 4, "a bool, got int"),
        ("learned_token_mass", 0.1, "a bool, got float"),
        ("bias", "no", "a bool, got str"),
    ],
)
def test_constructor_names_the_argument_of_wrong_type(
    name: str, value: object, expected: str
) -> None:
    with pytest.raises(TypeError, match=f"^SetAttention: {name} must be {expected}$"):
        SetAttention(**{"dim": 8, "num_heads": 2, name: value})


@pytest.mark.parametrize("method", ["forward", "transport_plan"])
def test_inputs_of_wrong_shape_are_named(method: str) -> None:
    call, x = getattr(SetAttention(24, 3), method), torch.zeros(2, 35, 24)
    for bad in (x[0], x[..., :23]):
        with pytest.raises(ValueError, match=r"x must be floating point \[B, N, C=24\], got"):
            call(bad)
    with pytest.raises(ValueError, match=r"mask must be bool \[B=2, N=35\], got"):
        call(x, torch.ones(2, 34, dtype=torch.bool))
    for grid in ((5, 8), (35,), (-5, -7)):
        with pytest.raises(ValueError, match=r"grid must be \(H, W\) with H \* W = N = 35, got"):
            call(x, grid=grid)


@pytest.mark.parametrize("method", ["forward", "transport_plan"])
def test_inputs_of_wrong_type_or_device_are_named(method: str) -> None:
    module, x = SetAttention(24, 3), torch.zeros(2, 35, 24)
    call, mask = getattr(module, method), torch.ones(2, 35, dtype=torch.bool)
    for bad in ([[1.0]], None):
        with pytest.raises(TypeError, match=r"SetAttention: x must be a tensor, got (list|None)"):
            call(bad)
    with pytest.raises(
        TypeError, match=r"x must be floating point \[B, N, C=24\], got torch.int64"
    ):
        call(x.long())
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(TypeError, match=f"x must be torch.float32 as the .*, got {dtype}"):
            call(x.to(dtype))
    with pytest.raises(ValueError, match="x must be on the parameters' device, cpu, got meta"):
        call(x.to("meta"))
    with pytest.raises(TypeError, match="mask must be a bool tensor or None, got list"):
        call(x, [True])
    with pytest.raises(TypeError, match=r"mask must be bool \[B=2, N=35\], got torch.float32"):
        call(x, mask.float())
    with pytest.raises(ValueError, match="mask must be on x's device, cpu, got meta"):
        call(x, mask.to("meta"))
    for grid in (6, (1.5, 4.0), (True, 35), "57"):
        with pytest.raises(TypeError, match=r"grid must be a pair of ints \(H, W\) or None, got"):
            call(x, grid=grid)
    assert call(x, mask, [5, 7]).isfinite().all()


def test_autocast_takes_x_of_another_dtype_but_float64() -> None:
    module, x = SetAttention(24, 3), tokens(2, 35, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(TypeError, match=r"x must be torch.float32 as .*, got torch.float64"):
            module(x)


def test_projections_may_be_replaced_by_modules_without_a_weight() -> None:
    """As quantization and adapters do; then there is nothing to compare x with."""
    module, x = make("default"), tokens(2, 35, 24)
    expected = module(x)
    module.key = nn.Sequential(module.key)
    assert torch.equal(module(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pooled references", "positions"])
def test_compiles_for_any_grid(name: str) -> None:
    module = make(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for grid in ((3, 5), (5, 7)):
        x = tokens(2, math.prod(grid), 24)
        torch.testing.assert_close(compiled(x, grid=grid), module(x, grid=grid))


@pytest.mark.parametrize("adaptive", [False, True])
def test_learned_masses_may_differ_by_more_than_a_type_holds(adaptive: bool) -> None:
    """exp(-200) is 0 in float32, which is no mass of a reference, and subnormal at exp(-100)."""
    torch.manual_seed(0)
    module = SetAttention(32, 2, 5, adaptive_reference_mass=adaptive)
    with torch.no_grad():
        module.reference_log_mass[:, 0] = 100
        module.reference_log_mass[:, 1] = -100
    x = torch.randn(2, 30, 32)
    out, plan = module(x), module.transport_plan(x)
    exact = copy.deepcopy(module).double()
    torch.testing.assert_close(out.double(), exact(x.double()), rtol=0, atol=1e-5)
    torch.testing.assert_close(plan.double(), exact.transport_plan(x.double()), rtol=0, atol=1e-5)
    out.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
