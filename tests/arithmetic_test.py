"""Which type is computed in where `model.dtype` is 'auto'."""

import pytest

from configs import tiny
from hetlora_jax import arithmetic, base_model, config
from hetlora_jax.arithmetic import Rates


@pytest.fixture(autouse=True)
def anew(monkeypatch, tmp_path):
  monkeypatch.setenv('HETLORA_CACHE', str(tmp_path))
  arithmetic.rates.cache_clear()
  yield
  arithmetic.rates.cache_clear()


# GFLOP/s of the processors that were met: Zen 3, Zen 4 with avx512_bf16, AMX.
@pytest.mark.parametrize(
  ('rates', 'fastest'),
  [
    (Rates(150, 91), 'float32'),
    (Rates(160, 290), 'bfloat16'),
    (Rates(350, 1900), 'bfloat16'),
    (Rates(100, 110), 'float32'),  # not worth the digits
  ],
)
def test_the_faster_type_is_taken_and_told(monkeypatch, rates, fastest):
  monkeypatch.setattr(arithmetic, '_measure', lambda dtype: getattr(rates, dtype.name))
  c = config.resolve(tiny.get_config()).replace(**{'model.dtype': 'auto'})
  assert base_model.compute_dtype(c).name == fastest
  told = f' (float32 {rates.float32}, bfloat16 {rates.bfloat16} GFLOP/s here)'
  assert base_model.why_dtype(c) == told
  given = c.replace(**{'model.dtype': 'float32'})
  assert base_model.compute_dtype(given).name == 'float32'
  assert base_model.why_dtype(given) == ''


def test_rates_are_measured_once_and_kept(monkeypatch, tmp_path):
  found = arithmetic.rates()
  assert min(found) > 0.01
  arithmetic.rates.cache_clear()
  monkeypatch.setattr(arithmetic, '_measure', None)  # is not called again
  assert arithmetic.rates() == found
  arithmetic.rates.cache_clear()
  monkeypatch.setattr(arithmetic, '_machine', lambda: 'another processor')
  with pytest.raises(TypeError):
    arithmetic.rates()  # it measures
  for damage in ('{', '{"another processor": {"float32": "fast"}}'):
    (tmp_path / 'arithmetic.json').write_text(damage)
    with pytest.raises(
      ValueError, match='arithmetic.json.* delete it, it is made anew'
    ):
      arithmetic.rates()
