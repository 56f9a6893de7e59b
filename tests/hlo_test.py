"""Collectives read from compiled programs, against what must be there."""

import jax
import jax.numpy as jnp
import pytest
from hlo import collectives
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hetlora_jax.tools.hlo import moved


def _array(shape, *spec):
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  where = NamedSharding(mesh, PartitionSpec(*spec))
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)


def _program(function, *arrays, out=()):
  mesh = arrays[0].sharding.mesh
  where = NamedSharding(mesh, PartitionSpec(*out))
  return jax.jit(function, out_shardings=where).lower(*arrays).compile().as_text()


def _collectives(function, *arrays, out=()):
  return collectives(_program(function, *arrays, out=out))


def test_a_product_over_a_split_axis_is_summed():
  (found,) = _collectives(
    jnp.matmul, _array((8, 16), None, 'a'), _array((16, 6), 'a', None)
  )
  assert found[:4] == ('all-reduce', ((8, 6),), 8 * 6 * 4, 1)


def test_a_split_array_that_is_wanted_whole_is_gathered():
  (found,) = _collectives(lambda x: x * 2, _array((16, 6), 'a'))
  assert found[:4] == ('all-gather', ((16, 6),), 16 * 6 * 4, 1)


def test_the_bytes_of_a_kind_add_up_over_collectives_and_turns():
  def turn(carry, _):
    return jnp.tanh(carry @ carry), None

  def two(x, y):
    return jax.lax.scan(turn, x, None, length=5)[0], y * 2

  arrays = _array((16, 16), 'a'), _array((16, 6), 'a')
  found = _collectives(two, *arrays)
  assert sorted(c.times for c in found if c.kind == 'all-gather') == [1, 1, 5]
  # Each product wants its right side whole; so do the two results.
  gathered = 5 * 16 * 16 * 4 + 16 * 16 * 4 + 16 * 6 * 4
  assert moved(_program(two, *arrays)) == {'all-gather': gathered}


def test_what_stays_where_it_is_needs_nothing():
  assert not _collectives(jnp.sin, _array((16, 6), 'a'), out=('a',))


def test_loops_within_loops_multiply():
  def inner(carry, _):
    return jnp.tanh(carry @ carry), None

  def outer(carry, _):
    return jax.lax.scan(inner, carry, None, length=4)[0].T, None

  found = _collectives(
    lambda x: jax.lax.scan(outer, x, None, length=3)[0],
    _array((16, 16), 'a'), out=('a',),
  )  # fmt: skip
  gather = next(x for x in found if x.kind == 'all-gather')
  assert (gather.bytes, gather.times) == (16 * 16 * 4, 12)
  turned = next(x for x in found if x.kind == 'all-to-all')
  assert (turned.bytes, turned.times) == (16 * 16 * 4 // 4, 3)


def test_a_branch_counts():
  def step(x, y):
    return jax.lax.cond(y.sum() > 0, lambda: x @ x, lambda: x)

  found = _collectives(
    step, _array((16, 16), 'a'), _array((2,)), out=('a',)
  )  # fmt: skip
  assert [x.kind for x in found] == ['all-gather']


def test_those_of_one_shard_map_are_several():
  def step(carry, _):
    return jnp.tanh(jax.lax.psum(carry, 'a')), None

  def work(x):
    x = jax.lax.psum(x, 'a')
    return jax.lax.scan(step, x, None, length=5)[0]

  x, split = _array((16, 8), 'a'), PartitionSpec('a')
  by_hand = jax.shard_map(
    work, mesh=x.sharding.mesh, in_specs=split, out_specs=split, check_vma=False
  )
  found = _collectives(by_hand, x, out=('a',))
  assert {c[:3] for c in found} == {('all-reduce', ((4, 8),), 4 * 8 * 4)}
  assert sorted(c.times for c in found) == [1, 5]


# As the TPU compiler writes: layouts with tiles, a pair of start and done, a
# loop whose length only its condition shows, one collective in two steps (of one
# chain; the permutes have only their channel in common), starts of several at
# once or that hold their operands, a wrapped one whose end names it again.
TPU = """HloModule jit_f, is_scheduled=true

%cond (p: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %p = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) parameter(0)
  %x = f32[8,4]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %start = (bf16[2,4]{1,0:T(8,128)(2,1)}, bf16[8,4]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %done = bf16[8,4]{1,0} all-gather-done(%start)
  %step = f32[9]{0} all-reduce(%x), channel_id=2, to_apply=%sum, frontend_attributes={chain_id="0"}
  ROOT %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%x, %x)
}

%wrapped (p: f32[6]) -> f32[6] {
  %p = f32[6]{0} parameter(0)
  ROOT %swap = f32[6]{0} all-to-all(%p), channel_id=5, dimensions={0}
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0:T(8,128)} parameter(0)
  %first = f32[9]{0} all-reduce(%a), channel_id=2, replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}, to_apply=%sum, frontend_attributes={chain_id="0"}
  %p1 = (f32[3]{0:T(128)S(1)}, f32[3]{0:T(128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=1, source_target_pairs={{0,1}}
  %p2 = (f32[5]{0:T(128)S(1)}, f32[5]{0:T(128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=1, source_target_pairs={{0,1}}
  %both = (f32[2]{0:T(128)}, f32[7]{0:T(128)}) all-reduce-start(%a, %a), channel_id=3, to_apply=%sum
  %parts = ((f32[8]{0:T(128)}, f32[16]{0}), (f32[2]{0:T(128)}, f32[4]{0}), u32[]{:S(2)}) reduce-scatter-start(f32[8,4] %a, %a), channel_id=4, dimensions={0}, to_apply=%sum
  %apart = (f32[2]{0:T(128)}, f32[4]{0}) reduce-scatter-done(%parts)
  %begun = ((f32[6]{0}), f32[6]{0}) async-start(%a), calls=%wrapped
  %ended = f32[6]{0} async-done(%begun), calls=%wrapped
  %w = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%a), condition=%cond, body=%body, metadata={op_name="jit(f)/while"}
  ROOT %r = f32[8,4]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""


AXES = "mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}"


@pytest.mark.parametrize(
  'want',
  [
    ('all-gather', ((8, 4),), 64, 5, '[2,4]<=[8]', 'start'),
    ('all-reduce', ((9,),), 36, 1, AXES, 'first'),
    ('collective-permute', ((3,),), 12, 1, '', 'p1'),
    ('collective-permute', ((5,),), 20, 1, '', 'p2'),
    ('all-reduce', ((2,), (7,)), 36, 1, '', 'both'),
    ('reduce-scatter', ((2,), (4,)), 24, 1, '', 'parts'),
    ('all-to-all', ((6,),), 24, 1, '', 'swap'),
  ],
  ids=lambda want: want[-1],
)
def test_programs_of_tpus_are_read(want):
  assert want in collectives(TPU)


def test_programs_of_tpus_have_no_more():
  assert len(collectives(TPU)) == 7
  assert moved(TPU) == {
    'all-gather': 5 * 64,
    'all-reduce': 36 + 36,
    'collective-permute': 12 + 20,
    'reduce-scatter': 24,
    'all-to-all': 24,
  }
