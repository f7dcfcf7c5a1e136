import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.utils.class_weight import compute_class_weight

from cnn_jax.training.metrics import CrossEntropy, balanced_class_weights

LOGITS = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
LABELS = np.array([0, 3, 1, 1, 2, 0], np.int32)


def test_cross_entropy_is_the_negative_log_probability_of_the_label():
    expected = -log_softmax(LOGITS.astype(np.float64), axis=-1)[np.arange(6), LABELS]
    np.testing.assert_allclose(CrossEntropy()(LOGITS, LABELS), expected, rtol=1e-6)


@pytest.mark.parametrize(("smoothing", "weights"), [(0.1, None), (0.5, None), (0.0, (1.0, 0.5, 2.0, 0.0))])
def test_losses_are_pytorchs(smoothing, weights):
    """Not both at once: PyTorch weighs the smoothed part by the weights of the other classes."""
    torch = pytest.importorskip("torch")
    weight = None if weights is None else torch.tensor(weights)
    criterion = torch.nn.CrossEntropyLoss(weight, reduction="none", label_smoothing=smoothing)
    expected = criterion(torch.tensor(LOGITS), torch.tensor(LABELS).long())
    np.testing.assert_allclose(CrossEntropy(smoothing, weights)(jnp.asarray(LOGITS), LABELS), expected, rtol=1e-5)


def test_class_weights_multiply_the_smoothed_loss():
    weights = (1.0, 0.5, 2.0, 0.0)
    losses, weighted = (CrossEntropy(0.2, w)(jnp.asarray(LOGITS), LABELS) for w in (None, weights))
    np.testing.assert_allclose(weighted, np.array(weights)[LABELS] * losses, rtol=1e-6)


def test_balanced_class_weights_are_scikit_learns():
    expected = compute_class_weight("balanced", classes=np.arange(4), y=LABELS)
    np.testing.assert_allclose(balanced_class_weights(LABELS, 4), expected)
    assert np.mean(np.array(expected)[LABELS]) == pytest.approx(1)


def test_a_class_without_examples_has_no_weight():
    assert balanced_class_weights(np.array([0, 2, 2, 2]), 3) == pytest.approx((2, 0, 2 / 3))
