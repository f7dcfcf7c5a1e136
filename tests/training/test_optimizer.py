import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_jax.errors import UsageError
from cnn_jax.training.optimizer import Optimizer, Schedule, num_steps, scale_by_adam


def adam_in_float64(gradients, b1=0.9, b2=0.999, eps=1e-8):
    """The updates of Algorithm 1 of the paper, with a learning rate of 1 and without its sign."""
    m = v = 0.0
    for t, gradient in enumerate(gradients, start=1):
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * gradient**2
        yield m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)


def test_updates_are_those_of_the_paper():
    gradients = np.random.default_rng(0).normal(size=(200, 50)).astype(np.float32)
    transformation = scale_by_adam()
    state = transformation.init(jnp.zeros(50))
    for gradient, expected in zip(gradients, adam_in_float64(gradients.astype(np.float64)), strict=True):
        updates, state = transformation.update(gradient, state)
        np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 10, 100_000])
def test_the_bias_correction_is_accurate(steps):
    """With constant moments, the update is the quotient of the corrections, to which optax's float32 adds 2e-5."""
    transformation = scale_by_adam(eps=0.0)
    state = optax.ScaleByAdamState(jnp.int32(steps - 1), mu=jnp.float32(1), nu=jnp.float32(1))
    update, _ = transformation.update(jnp.float32(1), state)
    np.testing.assert_allclose(update, np.sqrt(1 - 0.999**steps) / (1 - 0.9**steps), rtol=3e-7)


def test_equal_settings_are_equal():
    assert {Optimizer(): 1}[Optimizer()] == 1
    assert Optimizer() != Optimizer("sgd")
    assert Optimizer(schedule=Schedule("linear", 10)) == Optimizer(schedule=Schedule("linear", 10))


KERNEL, BIAS = np.random.default_rng(0).normal(size=(3, 4)), np.random.default_rng(1).normal(size=4)
GRADIENTS = [
    {"kernel": kernel, "bias": bias}
    for kernel, bias in zip(
        np.random.default_rng(2).normal(size=(6, 3, 4)), np.random.default_rng(3).normal(size=(6, 4)), strict=True
    )
]


def train(optimizer, gradients=GRADIENTS, layer="hidden", learning_rate=0.1):
    """The parameters of a layer after updates by the gradients, as one vector for each step."""
    params = {layer: {"kernel": jnp.float32(KERNEL), "bias": jnp.float32(BIAS)}}
    state, history = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update({layer: jax.tree.map(jnp.float32, gradient)}, state, params, learning_rate)
        params = optax.apply_updates(params, updates)
        history.append(np.concatenate([params[layer][name].ravel() for name in ("kernel", "bias")]))
    return np.stack(history)


def train_in_pytorch(make_optimizer, gradients=GRADIENTS, make_schedule=None, clip_norm=None):
    torch = pytest.importorskip("torch")
    params = {name: torch.tensor(value, requires_grad=True) for name, value in [("kernel", KERNEL), ("bias", BIAS)]}
    optimizer = make_optimizer(torch.optim, params)
    schedule = make_schedule and make_schedule(torch.optim.lr_scheduler, optimizer)
    history = []
    for gradient in gradients:
        for name, param in params.items():
            param.grad = torch.tensor(gradient[name])
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(params.values(), clip_norm)
        optimizer.step()
        if schedule:
            schedule.step()
        history.append(np.concatenate([param.detach().numpy().ravel() for param in params.values()]))
    return np.stack(history)


def test_adamw_is_pytorchs_and_decays_kernels_only():
    expected = train_in_pytorch(
        lambda optim, params: optim.AdamW(
            [{"params": [params["kernel"]], "weight_decay": 0.3}, {"params": [params["bias"]], "weight_decay": 0.0}],
            lr=0.1,
        )
    )
    np.testing.assert_allclose(train(Optimizer("adamw", weight_decay=0.3)), expected, rtol=1e-5, atol=1e-6)


def test_sgd_is_pytorchs_with_nesterov_momentum():
    expected = train_in_pytorch(
        lambda optim, params: optim.SGD(params.values(), lr=0.1, momentum=0.8, nesterov=True), clip_norm=0.5
    )
    ours = train(Optimizer("sgd", momentum=0.8, clip_norm=0.5))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_weight_decay_of_sgd_is_decoupled_from_its_momentum():
    still = [jax.tree.map(np.zeros_like, gradient) for gradient in GRADIENTS]
    ours = train(Optimizer("sgd", weight_decay=0.5), still)
    for step, params in enumerate(ours, start=1):
        np.testing.assert_allclose(params, np.concatenate([KERNEL.ravel() * 0.95**step, BIAS]), rtol=1e-5)


def test_accumulated_gradients_are_averaged():
    pairs = zip(GRADIENTS[::2], GRADIENTS[1::2], strict=True)
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in pairs]
    ours = train(Optimizer("adamw", weight_decay=0.1, accumulate=2))
    np.testing.assert_allclose(ours[1::2], train(Optimizer("adamw", weight_decay=0.1), means), rtol=1e-5)
    np.testing.assert_array_equal(ours[2], ours[1])


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_the_backbone_has_a_rate_of_its_own(rate):
    """Without an effect on the head."""
    slow = Optimizer("adamw", weight_decay=0.1, backbone_rate=rate)
    np.testing.assert_allclose(
        train(slow), train(Optimizer("adamw", weight_decay=0.1), learning_rate=0.1 * rate), rtol=1e-6
    )
    np.testing.assert_array_equal(train(slow, layer="out"), train(Optimizer("adamw", weight_decay=0.1), layer="out"))


def test_muon_orthogonalizes_kernels_except_the_heads():
    """The singular values of an update are those of an orthogonal matrix, scaled to the size of Adam's updates."""
    ours, before = train(Optimizer("muon"), GRADIENTS[:1], learning_rate=1.0)[0], np.concatenate([KERNEL.ravel(), BIAS])
    update = before - ours
    values = np.linalg.svd(update[:12].reshape(3, 4), compute_uv=False) / (0.2 * np.sqrt(4))
    assert values.min() > 0.6
    assert values.max() < 1.3
    first = np.abs(update[12])
    np.testing.assert_allclose(update[12:], first * np.sign(GRADIENTS[0]["bias"]), rtol=1e-4)
    head = train(Optimizer("muon"), GRADIENTS[:1], layer="out", learning_rate=1.0)[0]
    np.testing.assert_allclose((before - head)[:12], first * np.sign(GRADIENTS[0]["kernel"]).ravel(), rtol=1e-4)


def test_muon_is_pytorchs():
    """Whose iteration is in bfloat16, so the digits are few."""
    torch = pytest.importorskip("torch")
    kernel = torch.tensor(KERNEL.T, dtype=torch.float32, requires_grad=True)
    options = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.8, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon([kernel], **options)
    ours = train(Optimizer("muon", weight_decay=0.2, momentum=0.8))
    for gradient, params in zip(GRADIENTS, ours, strict=True):
        kernel.grad = torch.tensor(gradient["kernel"].T, dtype=torch.float32)
        muon.step()
        np.testing.assert_allclose(params[:12].reshape(3, 4), kernel.detach().numpy().T, atol=0.01)


def test_muon_takes_a_convolution_for_a_matrix_of_its_output_channels():
    optimizer = Optimizer("muon")
    params = {"conv": {"kernel": jnp.ones((3, 3, 2, 5))}}
    gradient = np.random.default_rng(0).normal(size=(3, 3, 2, 5)).astype(np.float32)
    updates, _ = optimizer.update({"conv": {"kernel": gradient}}, optimizer.init(params), params, 1.0)
    values = np.linalg.svd(np.reshape(updates["conv"]["kernel"], (18, 5)), compute_uv=False) / (0.2 * np.sqrt(18))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_adam_has_no_weight_decay():
    with pytest.raises(UsageError, match="adamw"):
        Optimizer(weight_decay=0.1)


@pytest.mark.parametrize(
    ("kind", "make_schedule", "tolerance"),
    [
        ("linear", lambda module, optimizer: module.LinearLR(optimizer, 1.0, 0.0, total_iters=500), 1e-6),
        ("cosine", lambda module, optimizer: module.CosineAnnealingLR(optimizer, T_max=500), 1e-6),
        # PyTorch's peak is a step earlier.
        ("one-cycle", lambda module, optimizer: module.OneCycleLR(optimizer, 0.3, total_steps=500), 4e-3),
    ],
)
def test_schedules_are_pytorchs(kind, make_schedule, tolerance):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    schedule, expected = make_schedule(torch.optim.lr_scheduler, optimizer), []
    for _ in range(499):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rates = 0.3 * jax.vmap(Schedule(kind, updates=500))(jnp.arange(499))
    np.testing.assert_allclose(rates, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_warm_up_rises_from_zero_to_the_peak(kind):
    rates = 0.4 * jax.vmap(Schedule(kind, updates=20, warmup=4))(jnp.arange(21))
    np.testing.assert_allclose(rates[:5], [0, 0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    assert rates[-1] == pytest.approx(0.4 if kind == "constant" else 0, abs=1e-7)
    assert (np.diff(rates[4:]) <= 0).all()


def test_a_one_cycle_schedule_peaks_after_the_warm_up():
    for warmup in (5, 29, 57):
        rates = jax.vmap(Schedule("one-cycle", updates=100, warmup=warmup))(jnp.arange(100))
        assert np.argmax(rates) == warmup


def test_a_schedule_drives_the_updates():
    expected = train_in_pytorch(
        lambda optim, params: optim.Adam(params.values(), lr=0.1),
        make_schedule=lambda module, optimizer: module.LinearLR(optimizer, 1.0, 0.0, total_iters=6),
    )
    np.testing.assert_allclose(train(Optimizer(schedule=Schedule("linear", updates=6))), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine", "one-cycle"])
def test_a_warm_up_as_long_as_the_run_is_an_error(kind):
    with pytest.raises(UsageError, match="the warm-up takes 20 updates, and the whole run 20"):
        Schedule(kind, updates=20, warmup=20)


@pytest.mark.parametrize(
    ("duration", "steps"), [("2 epochs", 200), ("1 epoch", 100), ("0.25epochs", 25), ("7 steps", 7), ("0 epochs", 0)]
)
def test_durations(duration, steps):
    assert num_steps(duration, steps_per_epoch=100) == steps
