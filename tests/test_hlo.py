"""What is read from the texts of compiled programs."""

import sys
from pathlib import Path

import jax

from cnn_jax.config import Config
from cnn_jax.training.ahead import lower_training
from cnn_jax.training.loop import abstract_state, create_task_for
from cnn_jax.training.sharding import make_mesh

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
from hlo import collectives, num_kernels, num_launches


def test_devices_sum_gradients_loss_and_number_correct_at_once(dataset):
    task = create_task_for(Config(batch_size=9), dataset)
    lowered = lower_training(task, dataset.image_shape, make_mesh(jax.devices()[:2]), batch_size=9, steps_per_epoch=6)
    num_parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_state(task, dataset.image_shape).params))
    assert collectives(lowered.compile().as_text()) == [("all-reduce", 4 * (num_parameters + 2))]


def test_bytes_of_collectives():
    text = """
  %psum.1 = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce-start(%x, %y), replica_groups={}
  %psum.2 = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce-done(%psum.1)
  %gather.1 = (f32[4]{0}, f32[8]{0}) all-gather-start(%copy.1), dimensions={0}
  %copy.1 = f32[4]{0} copy(%p)
  %permute.1 = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[]) collective-permute-start(%copy.1)
  %gather.2 = s4[65]{0} all-gather(%copy.2), dimensions={0}
  %spread.1 = pred[3]{0} collective-broadcast(%copy.3), replica_groups={}
"""
    assert collectives(text) == [
        ("all-reduce", 4 * 4 + 2 * 6),
        ("all-gather", 4 * 8),
        ("collective-permute", 4 * 32),
        ("all-gather", 33),
        ("collective-broadcast", 3),
    ]


def test_kernels_are_counted():
    text = """
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %fusion.1 = (f32[4]{0}, f32[2,3]{1,0}) fusion(%x), kind=kLoop, calls=%fused
  %psum.1 = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce-start(%x, %y), replica_groups={}
  %psum.2 = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce-done(%psum.1)
  ROOT %t = (s32[], f32[4]{0}) tuple(%i, %z)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %copy.1 = f32[4]{0} copy(%p)
  %gather.1 = (f32[4]{0}, f32[8]{0}) all-gather-start(%copy.1), dimensions={0}
  %while.1 = (s32[], f32[4]{0}) while(%t), condition=%cond, body=%body
}
"""
    assert num_kernels(text) == 2


THUNKS = """
000: kCommandBuffer [source       | next=012 (1)]
    001: kCopy         [source | sink] kCopy
012: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    013: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1]
  body:
    014: kCustomKernel  [source       | next=015 (1)] loop_multiply_fusion grid: [613, 1, 1]
    015: kConvolution   [prev=014 (1) | next=016 (1)] kConvolution
    000: kCommandBuffer [prev=017 (1) | next=057 (1)]
        018: kCustomKernel [source        | next=019 (1)] loop_reduce_fusion_1 grid: [150, 1, 1]
        019: kCustomKernel [prev=018 (1)  | next=020 (1)] gemm_fusion_dot_12 grid: [840, 1, 1]
    057: kConvolution   [prev=000 (1) | next=058 (1)] kConvolution
000: kCommandBuffer [prev=012 (1) | sink        ]
    073: kCustomKernel [source | sink] wrapped_add_1 grid: [1, 1, 1]
"""
"""From XLA's dump of the lesson's training program for an H100, abridged."""


def test_launches_of_a_step():
    """The condition, a kernel, two convolutions, and a command buffer."""
    assert num_launches(THUNKS) == 5
    assert num_launches("\n".join(THUNKS.splitlines()[9:12])) == 1  # a command buffer and no loop
    inside = "000: kCommandBuffer\n" + "\n".join(f"    {line}" for line in THUNKS.splitlines()[3:])
    assert num_launches(inside) == 0  # the whole loop is launched once
    assert num_launches("") is None
