"""The streaming statistics find what a float64 SVD of all vectors finds, exactly or by a sketch."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salora_plugins.activations import waiting
from salora_plugins.activations.statistics import Engine, choose_engine
from salora_plugins.activations.vectors import (
    ExactStatistics,
    OutputStatistics,
    RandomRows,
    SketchedStatistics,
    decompose_together,
    update_together,
)
from salora_plugins.activations.waiting import WaitingUpdates
from salora_plugins.initialization import pissa_factors
from salora_plugins.ranks import rank_for_share, ranks_of
from salora_plugins.support import linear_algebra
from salora_plugins.support.linear_algebra import (
    eigh,
    svd,
    svd_of_product,
    top_eigenpairs,
    top_right_singular_vectors,
    truncated_svd,
)
from tiny import smallest_cosine

SPECTRA = {
    "fast": lambda d: 0.9 ** torch.arange(d, dtype=torch.float64),
    "like 1/i": lambda d: 1 / torch.arange(1, d + 1, dtype=torch.float64),
    "slow, like 1/sqrt(i)": lambda d: torch.arange(1, d + 1, dtype=torch.float64) ** -0.5,
    "flat": lambda d: torch.ones(d, dtype=torch.float64),
}


def vectors(count: int, spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """(count, d) with these very singular values, in float64."""
    generator = torch.Generator().manual_seed(seed)
    size = min(count, spectrum.shape[0])
    left = torch.linalg.qr(torch.randn(count, size, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(spectrum.shape[0], size, generator=generator, dtype=torch.float64)).Q
    return (left * spectrum[:size]) @ right.T


def captured(rows: torch.Tensor, basis: torch.Tensor) -> float:
    return torch.linalg.norm(rows @ basis.double()).square().item()


def stream(statistics, rows: torch.Tensor, batch: int = 300):
    for part in rows.split(batch):
        statistics.update(part)
    return statistics


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_sketch_captures_what_the_exact_directions_capture(spectrum, width):
    """At least 99.9 % of it; in float32, as vectors come from a model."""
    dimension, rank = 640, 32
    rows = vectors(4000, SPECTRA[spectrum](dimension))
    statistics = stream(SketchedStatistics(dimension, width * rank), rows.float())
    basis, values = statistics.top(rank)
    best = SPECTRA[spectrum](dimension)[:rank].square().sum().item()
    assert captured(rows, basis) >= 0.999 * best
    assert torch.allclose(basis.T @ basis, torch.eye(rank), atol=1e-5)
    assert statistics.energy == pytest.approx(rows.square().sum().item(), rel=1e-5)
    # What it says of itself is a little less than what it is: it never sees energy that is not there.
    assert 0.95 * captured(rows, basis) <= values.double().square().sum().item() <= 1.00001 * captured(rows, basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4, 1e5])
@pytest.mark.parametrize(("channels", "always"), [([5], True), ([7, 100, 333, 400], False)])
def test_what_lies_beside_massive_activations(always, channels, scale, dtype):
    """A few channels 10^2 to 10^5 times as large, as in real models: 99.9 % of what the directions beside them hold."""
    dimension, rank, count = 420, 24, 1500
    generator = torch.Generator().manual_seed(3)
    for spectrum in ("fast", "slow, like 1/sqrt(i)"):
        rows = count**0.5 * vectors(count, SPECTRA[spectrum](dimension))
        sizes = 1 + 0.1 * torch.randn(count, len(channels), generator=generator, dtype=torch.float64)
        seen = always | (torch.rand(count, 1, generator=generator) < 0.05)
        rows[:, channels] = torch.where(seen, scale * sizes, rows[:, channels])
        check_beside(rows.to(dtype), torch.eye(dimension, dtype=torch.float64)[:, channels], rank)


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e5])
def test_what_lies_beside_a_massive_direction(scale):
    """The same for a direction that is no channel, as in the outputs of a layer that has such inputs."""
    rows = 1500**0.5 * vectors(1500, SPECTRA["like 1/i"](640))
    direction = torch.nn.functional.normalize(torch.randn(640, 1, dtype=torch.float64), dim=0)
    rows += (scale * (1 + 0.1 * torch.randn(1500, 1, dtype=torch.float64)) - rows @ direction) @ direction.T
    check_beside(rows.float(), direction, 32)


def check_beside(rows: torch.Tensor, outliers: torch.Tensor, rank: int) -> None:
    """Exact and sketched directions hold the outliers, and of the rest what the best ones beside them do."""
    double = rows.double()
    beside = double - double @ outliers @ outliers.T
    number = rank - outliers.shape[1]
    best = torch.linalg.svdvals(beside)[:number].square().sum().item()
    for statistics, least in (
        (ExactStatistics(rows.shape[1]), 0.9999),
        (SketchedStatistics(rows.shape[1], 4 * rank), 0.999),
    ):
        basis, values = stream(statistics, rows).top(rank)
        basis = basis.double()
        assert torch.linalg.norm(basis.T @ outliers).square() > outliers.shape[1] - 1e-2
        own = torch.linalg.svd(basis - outliers @ (outliers.T @ basis), full_matrices=False)[0][:, :number]
        assert captured(beside, own) >= least * best
        assert statistics.energy == pytest.approx(double.square().sum().item(), rel=1e-6)
        assert values.double().square().sum() == pytest.approx(captured(double, basis), rel=1e-4)


def test_a_sketch_learns_directions_that_come_late():
    """After batches without variety, whose factor has fewer directions than rows."""
    first = vectors(600, SPECTRA["flat"](2)) @ torch.eye(2, 100, dtype=torch.float64)
    later = vectors(2000, SPECTRA["like 1/i"](100), seed=1)
    rows = torch.cat([first, later])
    basis, _ = stream(SketchedStatistics(100, 16), rows.float(), 200).top(8)
    assert captured(rows, basis) >= 0.999 * torch.linalg.svdvals(rows)[:8].square().sum()


def test_a_sketch_keeps_few_vectors_as_they_are_and_no_more_than_its_width():
    rows = vectors(1000, SPECTRA["slow, like 1/sqrt(i)"](200)).float()
    statistics = SketchedStatistics(200, 64)
    statistics.update(rows[:40])
    assert torch.equal(statistics.factor(), rows[:40])
    for part in rows[40:].split(100):
        statistics.update(part)
        assert statistics.factor().shape == (64, 200)
    same = stream(SketchedStatistics(200, 64), rows[:40])
    stream(same, rows[40:], 100)
    assert torch.equal(same.factor(), statistics.factor())


def test_a_sketch_of_vectors_without_variety():
    """Few directions, or none at all: no NaN, and the directions that there are."""
    rows = vectors(500, SPECTRA["flat"](3)) @ torch.linalg.qr(torch.randn(100, 3, dtype=torch.float64)).Q.T
    basis, values = stream(SketchedStatistics(100, 16), rows.float()).top(8)
    assert captured(rows, basis[:, :3]) >= 0.999 * rows.square().sum()
    assert values[3:].max() <= 1e-2 * values[0]
    zeros = stream(SketchedStatistics(100, 16), torch.zeros(500, 100))
    basis, values = zeros.top(8)
    assert torch.isfinite(basis).all() and not values.any() and zeros.energy == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "dimension", "rank"), [(50, 400, 8), (900, 400, 32), (700, 24, 6), (390, 400, 1)])
def test_exact_directions_equal_a_float64_svd(count, dimension, rank, dtype):
    rows = vectors(count, SPECTRA["like 1/i"](dimension)).to(dtype)
    statistics = stream(ExactStatistics(dimension), rows, 128)
    basis, values = statistics.top(rank)
    _, reference, right = torch.linalg.svd(rows.double(), full_matrices=False)
    assert smallest_cosine(basis, right[:rank].T) > 1 - 1e-6
    assert torch.allclose(values.double(), reference[:rank], rtol=1e-4)
    assert torch.allclose(statistics.gram(), rows.double().T @ rows.double(), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    dimension=st.integers(2, 24),
    sizes=st.lists(st.integers(0, 20), min_size=1, max_size=5),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
def test_however_the_stream_is_cut(dimension, sizes, seed, data):
    count = sum(sizes)
    if count == 0:
        return
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dimension, generator=generator) * torch.logspace(0, -2, dimension)
    statistics = ExactStatistics(dimension)
    for part in rows.split(sizes):
        statistics.update(part)
    rank = data.draw(st.integers(1, min(count, dimension)))
    basis, values = statistics.top(rank)
    reference = torch.linalg.svdvals(rows.double())[:rank]
    assert torch.allclose(values.double(), reference, rtol=1e-3, atol=1e-5)
    assert captured(rows.double(), basis) >= reference.square().sum() * (1 - 1e-5)
    assert torch.allclose(basis.T @ basis, torch.eye(rank), atol=1e-5)
    assert statistics.count == count


@pytest.mark.parametrize("kind", ["exact", "sketched"])
@pytest.mark.parametrize(("d_in", "d_out"), [(96, 400), (400, 96), (320, 320), (300, 2000)])
def test_outputs_by_way_of_the_inputs(d_in, d_out, kind):
    """The directions of W x from statistics of x alone; sketched ones lose little."""
    inputs = vectors(1500, SPECTRA["like 1/i"](d_in))
    weight = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(1)) / d_in**0.5
    base = stream(Engine(kind, input_width=64).statistics(d_in, "input"), inputs.float())
    outputs = OutputStatistics(base, d_out, lambda: nullcontext(weight))
    rows = inputs @ weight.double().T
    stream(outputs, rows.float())
    basis, values = outputs.top(16)
    _, reference, right = torch.linalg.svd(rows, full_matrices=False)
    best = reference[:16].square().sum().item()
    assert captured(rows, basis) >= (1 - 1e-6 if kind == "exact" else 0.999) * best
    if kind == "exact":
        assert smallest_cosine(basis, right[:16].T) > 1 - 1e-4
        assert torch.allclose(values.double(), reference[:16], rtol=1e-3)
    assert outputs.energy == pytest.approx(rows.square().sum().item(), rel=1e-5)
    assert outputs.most_directions == min(1500, d_out, base.most_directions)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_top_eigenpairs_of_a_large_matrix(spectrum):
    values = SPECTRA[spectrum](1200)
    vectors = torch.linalg.qr(torch.randn(1200, 1200, dtype=torch.float64)).Q
    matrix = (vectors * values.square()) @ vectors.T
    found, basis = top_eigenpairs(lambda block: matrix @ block, 1200, 20, device=torch.device("cpu"))
    assert torch.allclose(found, values[:20].square(), rtol=1e-5)
    assert torch.allclose(basis.T @ basis, torch.eye(20, dtype=torch.float64), atol=1e-10)
    if spectrum != "flat":
        assert smallest_cosine(basis, vectors[:, :20]) > 1 - 1e-4


@pytest.mark.parametrize(("m", "k", "n"), [(30, 4, 20), (3, 8, 20), (20, 8, 3)])
def test_svd_of_a_product(m, k, n):
    left, right = torch.randn(m, k), torch.randn(k, n)
    u, s, vh = svd_of_product(left, right)
    product = left.double() @ right.double()
    assert u.shape[1] == s.shape[0] == vh.shape[0] == min(m, k, n)
    assert torch.allclose((u * s) @ vh, product)
    assert torch.allclose(s, torch.linalg.svdvals(product)[: s.shape[0]])


@pytest.mark.parametrize("shape", [(700, 600), (600, 1500), (2, 800, 640)])
def test_truncated_svd_of_large_matrices(shape):
    generator = torch.Generator().manual_seed(0)
    size = min(shape[-2:])
    # Singular values that fall by a tenth from one to the next, down to a thousandth of the largest.
    spectrum = 0.9 ** torch.arange(size) + 1e-3
    matrix = torch.randn(*shape[:-1], size, generator=generator) @ (
        spectrum[:, None] * torch.randn(size, shape[-1], generator=generator)
    )
    state = torch.get_rng_state()
    u, s, vh = truncated_svd(matrix, 12)
    assert torch.equal(torch.get_rng_state(), state)
    reference = torch.linalg.svdvals(matrix.double())[..., :12]
    assert torch.allclose(s.double(), reference, rtol=1e-3)
    assert torch.allclose(u.mT @ u, torch.eye(12).expand(*shape[:-2], 12, 12), atol=1e-4)
    approximation = (u * s[..., None, :]) @ vh
    full = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (full.U[..., :12] * full.S[..., None, :12]) @ full.Vh[..., :12, :]
    assert torch.linalg.norm(matrix - approximation) <= 1.001 * torch.linalg.norm(matrix - best)
    if len(shape) == 3:
        assert torch.allclose(truncated_svd(matrix[1], 12)[1], s[1], rtol=1e-4)


def failing_decompositions(monkeypatch, name: str, times: int) -> list[torch.Size]:
    """The first calls of torch.linalg's function fail, in turns as cuSOLVER does and with NaN; shapes of all calls."""
    original, calls = getattr(torch.linalg, name), []

    def stand_in(matrix, *args, **kwargs):
        calls.append(matrix.shape)
        if len(calls) > times:
            return original(matrix, *args, **kwargs)
        if len(calls) % 2:
            raise torch.linalg.LinAlgError(f"linalg.{name}: The algorithm failed to converge (error code: 992).")
        return tuple(torch.full_like(part, float("nan")) for part in original(matrix, *args, **kwargs))

    monkeypatch.setattr(torch.linalg, name, stand_in)
    monkeypatch.setattr(linear_algebra, "_said", set())
    return calls


@pytest.mark.parametrize("times", [1, 2, 100])
def test_decompositions_that_fail_are_computed_otherwise(monkeypatch, caplog, times):
    rows = vectors(900, SPECTRA["like 1/i"](300)).float()
    weight = vectors(80, SPECTRA["fast"](60)).float()
    expected, (a, b) = stream(ExactStatistics(300), rows).top(20), pissa_factors(weight, 8, 1.0)
    for name in ("eigh", "svd"):
        with monkeypatch.context() as patch:
            calls = failing_decompositions(patch, name, times)
            basis, values = stream(ExactStatistics(300), rows).top(20)
            assert smallest_cosine(basis, expected[0]) > 1 - 1e-6
            assert torch.allclose(values, expected[1], rtol=1e-4)
            a2, b2 = pissa_factors(weight, 8, 1.0)
            assert torch.allclose(b2 @ a2, b @ a, atol=1e-5) and calls
            pissa_factors(weight, 8, 1.0)
        assert len([r for r in caplog.records if f"torch.linalg.{name} on cpu failed" in r.message]) == 1


@pytest.mark.parametrize("size", [40, 700])
def test_decompositions_of_matrices_of_low_rank_and_equal_eigenvalues(size):
    few = torch.randn(5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for matrix in (few.T @ few, torch.eye(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)):
        values, vectors = eigh(1e8 * matrix)
        assert torch.allclose((vectors * values) @ vectors.T, 1e8 * matrix, atol=1e-10 * 1e8 * size)
        for scale in (1e-8, 1.0, 1e8):
            scaled = scale * matrix
            found, basis = top_eigenpairs(lambda block: scaled @ block, size, 4, device=matrix.device)  # noqa: B023
            assert torch.allclose(basis.T @ basis, torch.eye(4, dtype=torch.float64), atol=1e-10)
            assert torch.allclose(found, torch.linalg.eigvalsh(scaled).flip(0)[:4], atol=1e-8 * size * scale)
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        eigh(matrix.fill_(float("nan")))
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        svd(matrix)


def test_the_engine_is_chosen_by_size():
    large = {"rank": 32, "num_weights": 10**10}
    assert choose_engine("auto", [4096], [4096], **large).kind == "exact"
    assert choose_engine("auto", [8192] * 4, [], **large) == Engine("sketched", 128, 128, 256, 1.5)
    assert choose_engine("auto", [8192], [8192] * 3, input_rank=64, **large) == Engine("sketched", 128, 256, 256, 1.5)
    assert choose_engine("exact", [8192] * 4, [], **large) == Engine("exact")
    # 10**6 weights allow 200 kB of sketches: 50 numbers for each of 1,000 dimensions, but never less than 2 * rank.
    small = {"num_weights": 10**6}
    assert choose_engine("sketched", [1000], [], rank=20, **small).width == 50
    assert choose_engine("sketched", [1000], [], rank=32, **small).width == 64
    both = choose_engine("sketched", [1000], [500], rank=10, input_rank=20, **small)  # 2.5 a direction
    assert (both.width, both.input_width) == (25, 50)
    engine = choose_engine("sketched", [4096] * 100, [], **large)
    assert isinstance(engine.statistics(128), ExactStatistics)
    assert isinstance(engine.statistics(129), SketchedStatistics)
    automatic = choose_engine("auto", [4096] * 100, [], **large)
    assert isinstance(automatic.statistics(256), ExactStatistics)
    assert isinstance(automatic.statistics(257), SketchedStatistics)
    assert isinstance(Engine("sketched", 128, 512, 256, 1.5).statistics(768, "input"), ExactStatistics)
    assert isinstance(Engine("sketched", 128, 512, 256, 1.5).statistics(769, "input"), SketchedStatistics)


def test_rank_by_need():
    values = torch.tensor([3.0, 2.0, 1.0])
    assert [rank_for_share(values, 14, share) for share in (0.5, 0.65, 0.9, 0.93, 0.999)] == [1, 2, 2, 3, 3]
    assert rank_for_share(values, 20, 0.9) is None
    names = ["layers.0.q_proj", "layers.0.v_proj", "layers.1.v_proj"]
    assert list(ranks_of(names, 8, {"layers.1.v_proj": 2, "v_proj": 0.5}).values()) == [8, 0.5, 2]
    assert list(ranks_of(names, 8, {r".*\.1\..*": 3}).values()) == [8, 8, 3]
    with pytest.raises(ValueError, match=r"safety_rank_pattern: 'k_proj' decides the rank of no target module"):
        ranks_of(names, 8, {"k_proj": 2})


def test_streams_of_one_shape_are_decomposed_together(monkeypatch):
    """A GPU is asked once for all layers of a shape; what is found is what each finds alone."""
    torch.manual_seed(0)
    data = [torch.randn(40, 96) * torch.linspace(3, 0.1, 96) for _ in range(5)] + [torch.randn(30, 64)]
    together, alone = ([stream(ExactStatistics(rows.shape[1]), rows) for rows in data] for _ in range(2))
    weight = torch.randn(112, 64)
    together.append(OutputStatistics(together[-1], 112, lambda: nullcontext(weight)))
    together[-1].update(data[-1] @ weight.T)
    alone.append(OutputStatistics(alone[-1], 112, lambda: nullcontext(weight)))
    alone[-1].update(data[-1] @ weight.T)
    calls = []
    eigh = linear_algebra.eigh
    monkeypatch.setattr(linear_algebra, "eigh", lambda matrix: calls.append(matrix.shape) or eigh(matrix))
    decompose_together([(entry, 8) for entry in (*together, *together)])
    assert sorted(calls) == [(1, 30, 30), (1, 30, 30), (5, 40, 40)]
    for one, other in zip(together, alone, strict=True):
        basis, values = one.top(8)
        expected, singular_values = other.top(8)
        assert torch.allclose(values, singular_values, rtol=1e-5)
        assert torch.linalg.matrix_norm(basis.T @ expected, -2) > 1 - 1e-5  # every principal angle is 0
        assert one.directions(8) == other.directions(8) == 8
    assert len(calls) == 3 + len(alone)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_streams_are_updated_together_or_in_halves_where_memory_lacks(monkeypatch, failures):
    """Nothing is counted twice, or not at all."""
    torch.manual_seed(0)
    data = torch.randn(5, 300, 96) * torch.linspace(3, 0.1, 96)
    scales = torch.rand(60) + 0.5
    together, alone = ([SketchedStatistics(96, 32) for _ in data] for _ in range(2))
    compress, asked = SketchedStatistics._compress, []

    def compress_with_little_memory(self, factor, rows, random_rows):
        asked.append(rows.shape[:-2].numel())
        if len(asked) <= failures:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compress(self, factor, rows, random_rows)

    random_rows = RandomRows()
    with monkeypatch.context() as patch:
        patch.setattr(SketchedStatistics, "_compress", compress_with_little_memory)
        for batch in data.split(60, dim=1):
            update_together(together, batch.unbind(), scales, random_rows)
    assert asked == {0: [5], 1: [5, 2, 3], 2: [5, 2, 1, 1, 3]}[failures] + [5] * 4
    for one, other, rows in zip(together, alone, data, strict=True):
        for batch in rows.split(60):
            other.update(batch, scales)
        assert one.count == other.count == 300
        assert one.energy == pytest.approx(other.energy, rel=1e-6)
        assert torch.allclose(one.gram(), other.gram(), rtol=1e-4, atol=1e-4 * other.gram().abs().max())
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        asked.clear()
        failures = 10
        patch.setattr(SketchedStatistics, "_compress", compress_with_little_memory)
        update_together(together, data[:, :60].unbind(), scales)
    assert together[0].count == 300


def test_vectors_of_a_layer_that_is_called_twice_wait_in_their_order(monkeypatch):
    """Before a stream is updated, it gets what waits for it; and no more than a bound waits."""
    monkeypatch.setattr(linear_algebra, "SYNCHRONOUS", frozenset())
    torch.manual_seed(0)
    data = torch.randn(6, 3, 40, 96)
    queue = WaitingUpdates(lambda device: None)
    together, alone = ([SketchedStatistics(96, 32) for _ in range(3)] for _ in range(2))
    for of_call in data:
        for one, other, rows in zip(together, alone, of_call, strict=True):
            queue.add(one, rows)
            other.update(rows)
    assert together[0].count == 200
    queue.flush()
    for one, other in zip(together, alone, strict=True):
        assert one.count == 240
        assert torch.allclose(one.gram(), other.gram(), rtol=1e-4, atol=1e-4 * other.gram().abs().max())
    monkeypatch.setattr(waiting, "_BYTES_TOGETHER", 2 * together[0].bytes_of_update(40))
    for one, rows in zip(together, data[0], strict=True):
        queue.add(one, rows)
    assert [one.count for one in together] == [280, 280, 240]
    queue.forget()
    queue.flush()
    assert together[2].count == 240


@pytest.mark.parametrize("lost", [0, 3])
def test_bases_from_batched_products_are_those_of_qr(monkeypatch, lost):
    """As on a GPU; directions that are rounding errors only are left to QR."""
    rows = torch.stack([vectors(40, SPECTRA["like 1/i"](200)) for _ in range(3)])
    if lost:
        rows[1, -lost:] = 0
    expected, values = top_right_singular_vectors(rows, 40)
    monkeypatch.setattr(linear_algebra, "SYNCHRONOUS", frozenset())
    qr, calls = torch.linalg.qr, []
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: calls.append(matrix.shape) or qr(matrix))
    basis, found = top_right_singular_vectors(rows, 40)
    assert len(calls) == bool(lost)
    assert torch.allclose(found, values)
    assert torch.allclose(basis.mT @ basis, torch.eye(40, dtype=torch.float64).expand(3, 40, 40), atol=1e-12)
    some = 40 - lost
    assert torch.allclose(basis[..., :some], expected[..., :some], atol=1e-9)


def test_tensors_are_copied_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(linear_algebra, "_BYTES_PINNED", 100)
    at_once, sizes = linear_algebra._on_cpu_at_once, []
    monkeypatch.setattr(linear_algebra, "_on_cpu_at_once", lambda some: sizes.append(len(some)) or at_once(some))
    tensors = [torch.full((length,), float(length)) for length in (30, 10, 10, 10, 40, 1)]
    assert all(torch.equal(one, other) for one, other in zip(linear_algebra.on_cpu(tensors), tensors, strict=True))
    assert sizes == [1, 3, 1, 1] and linear_algebra.on_cpu([]) == []
