"""How conversations are written: as transformers does, plainly, as Alpaca, with names."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from configs import tiny
from hetlora_jax import base_model, config, formats
from hetlora_jax.config import ConfigError
from hetlora_jax.data import builders, people, rendering
from hetlora_jax.data.rendering import CLIENT, SYSTEM, USER, Chat, Template
from hetlora_jax.models.tokenizer import Tokenizer
from hetlora_jax.tools import generation
from tests.tokenizer_test import gemma, smollm2

GOLDEN = pathlib.Path(__file__).with_name('golden') / 'chat_templates.json'
MODELS = json.loads(GOLDEN.read_text())
CASES = [(name, case) for name in MODELS for case in MODELS[name]['cases']]
CHAT = Chat([(USER, 'Hi'), (CLIENT, 'Oh'), (USER, 'So?'), (CLIENT, 'Yes.')])
WHOLE = CHAT._replace(bears_from=0)
SUMMARY = Chat([(USER, 'A long mail.'), (CLIENT, 'Mail')], cue='Subject:')


def template(name):
  model = MODELS[name]
  return Template(model['template'], {k: model[k] for k in ('bos_token', 'eos_token')})


def text_of(rendered):
  pairs = ''.join(prompt + completion for prompt, completion in rendered.earlier)
  return pairs + rendered.prompt + rendered.cue + rendered.completion


@pytest.fixture(scope='module')
def tokenizer():
  return Tokenizer.train(['Hi, so. Yes? Oh! A long mail to ann.\n' * 3], 280)


@pytest.mark.parametrize(('name', 'case'), CASES)
def test_templates_render_as_in_transformers(name, case):
  if 'error' in case:
    with pytest.raises(ConfigError, match=r'config\.data\.format=.template.') as found:
      template(name).text(case['messages'], case['prompt'])
    assert case['error'] in str(found.value)
  else:
    assert template(name).text(case['messages'], case['prompt']) == case['text']


@pytest.mark.parametrize(('name', 'make'), [('gemma3', gemma), ('smollm2', smollm2)])
def test_special_tokens_get_their_ids_as_in_transformers(name, make):
  tokenizer = make()
  cases = [case for case in MODELS[name]['cases'] if 'ids' in case]
  assert len(cases) >= 6
  for case in cases:
    assert tokenizer.encode_special(case['text']) == case['ids']


def _turns(case):
  return [tuple(message.values()) for message in case['messages']]


@pytest.mark.parametrize('name', MODELS)
def test_a_completion_is_what_follows_the_generation_prompt(name):
  cases = MODELS[name]['cases']
  for whole, prompt in zip(cases[::2], cases[1::2], strict=True):
    if 'error' in whole:
      continue
    chat = Chat(_turns(whole))
    found = template(name).render(chat)
    assert (found.prompt, text_of(found)) == (prompt['text'], whole['text'])
    if name == 'qwen3':  # it thinks (of nothing) in the last turn alone
      with pytest.raises(ConfigError, match='bears loss cannot be told'):
        template(name).render(CHAT._replace(bears_from=0))
      continue
    found = template(name).render(chat._replace(bears_from=0))
    assert text_of(found) == whole['text']
    said = [text for role, text in chat.turns[1:] if role == CLIENT]
    spans = [*[completion for _, completion in found.earlier], found.completion]
    assert len(spans) == len(said)
    for span, text in zip(spans, said, strict=True):
      assert span.strip().startswith(text)


def test_a_conversation_that_the_client_begins_gets_an_empty_user_where_it_must():
  chat = Chat([(CLIENT, 'I begin.'), (USER, 'Do.'), (CLIENT, 'Done.')], bears_from=0)
  found = template('gemma3').render(chat)
  user, model = '<start_of_turn>user\n', '<start_of_turn>model\n'
  end = '<end_of_turn>\n'
  want = f'<bos>{user}{end}{model}I begin.{end}{user}Do.{end}{model}'
  assert (found.prompt, found.completion) == (want, f'Done.{end}')
  assert found.earlier == ()  # what opens it answers nobody
  assert f'{user.strip()}' not in template('smollm2').render(chat).prompt
  assert '<|im_start|>assistant\nI begin.' in template('smollm2').render(chat).prompt


def test_turns_of_one_role_are_one_and_a_target_may_be_its_end():
  turns = [(USER, 'a'), (USER, 'b'), (CLIENT, 'c'), (CLIENT, 'd')]
  found = template('gemma3').render(Chat(turns))
  assert found.prompt.endswith('user\na\nb<end_of_turn>\n<start_of_turn>model\nc\n')
  assert found.completion == 'd<end_of_turn>\n'
  both = template('gemma3').render(Chat(turns, bears_from=0))
  assert (both.earlier, both.completion) == ((), 'c\nd<end_of_turn>\n')
  alone = template('gemma3').render(Chat(turns[2:]))
  assert alone.prompt.endswith('user\n<end_of_turn>\n<start_of_turn>model\nc\n')


def test_a_summary_keeps_its_cue_and_is_asked_for_by_a_user():
  found = template('gemma3').render(SUMMARY)
  assert found.prompt == '<bos><start_of_turn>user\nA long mail.'
  assert found.cue == '\nSubject:<end_of_turn>\n<start_of_turn>model\n'
  assert rendering.as_data_set(SUMMARY) == ('A long mail.', ' Mail\n', '\nSubject:', (), False)  # fmt: skip


def test_formats_without_a_template(tokenizer):
  def render(name, chat):
    return rendering.make(name, tokenizer).render(chat)

  named = render('chat', WHOLE)
  assert named.earlier == (('B: Hi\nA:', ' Oh\n'),)
  assert (named.prompt, named.completion) == ('B: So?\nA:', ' Yes.\n')
  assert text_of(render('chat', CHAT)) == text_of(named)
  plain = render('plain', WHOLE)
  assert plain.earlier == (('<s>Hi\n', 'Oh</s>'),)
  assert (plain.prompt, plain.completion) == ('\nSo?\n', 'Yes.</s>')
  assert render('plain', CHAT).prompt == '<s>Hi\nOh</s>\nSo?\n'
  alpaca = render('alpaca', Chat([(USER, 'Sum up.'), (USER, 'Text'), (CLIENT, 'T')]))
  assert text_of(alpaca) == (
    '<s>Below is an instruction that describes a task, paired with an input that '
    'provides further context. Write a response that appropriately completes the '
    'request.\n\n### Instruction:\nSum up.\n\n### Input:\nText\n\n### Response:T</s>'
  )
  assert alpaca.cue == '\n\n### Response:'
  alone = text_of(render('alpaca', Chat([(USER, 'Go.'), (CLIENT, 'T')])))
  assert '### Input' not in alone and 'a task. Write' in alone  # noqa: PT018
  system = Chat([(SYSTEM, 'Be.'), *CHAT.turns], bears_from=0)
  assert render('chat', system).earlier[0][0] == 'Be.\nB: Hi\nA:'
  for name in ('plain', 'chat'):
    found = render(name, SUMMARY)
    assert found.prompt.endswith('A long mail.')
    assert found.cue == {'plain': '\n', 'chat': '\nA:'}[name]
  with pytest.raises(ConfigError, match=r"format='alpaca' .* no conversation"):
    render('alpaca', WHOLE)


def test_special_tokens_are_ids_and_bos_is_there_once(tokenizer):
  example = people.encode(tokenizer, rendering.make('plain', tokenizer).render(CHAT))
  tokens = example.tokens.tolist()
  assert tokens[0] == tokenizer.bos_id
  assert tokens.count(tokenizer.bos_id) == 1
  assert tokens[-1] == tokenizer.eos_id
  assert tokens.count(tokenizer.eos_id) == 2
  ours = dataclasses.replace(tokenizer, chat_template=MODELS['gemma3']['template'])
  example = people.encode(ours, rendering.make('template', ours).render(CHAT))
  assert example.tokens.tolist().count(tokenizer.bos_id) == 1
  assert tokenizer.decode(example.tokens[-example.num_target :]).startswith('Yes.')


def test_a_cue_and_the_start_stay_where_a_text_is_cut(tokenizer):
  format = rendering.make('alpaca', tokenizer)
  text = format.render(Chat([(USER, 'Go on and on. ' * 30), (CLIENT, 'Yes.')]))
  whole, cut = (people.encode(tokenizer, text, most) for most in (None, 200))
  assert len(cut.tokens) == 201  # an example takes a position less than tokens
  assert cut.cut == len(whole.tokens) - 201
  assert cut.tokens[0] == tokenizer.bos_id
  end = tokenizer.encode('\n\n### Response:') + tokenizer.encode_special('Yes.</s>')
  assert cut.tokens[-len(end) :].tolist() == end
  assert cut.tokens[:99].tolist() == whole.tokens[:99].tolist()


@pytest.mark.parametrize('name', ['gemma3', 'smollm2', 'mistral', 'llama3_2'])
def test_what_follows_an_answer_ends_it(name, tokenizer):
  # Its own tokenizer would be needed for one id; here the first letter's shows it.
  ours = dataclasses.replace(tokenizer, chat_template=MODELS[name]['template'])
  ends = rendering.make('template', ours).ends
  after = {'mistral': '</s>'}.get(name, '<')
  assert ends == {tokenizer.eos_id, tokenizer.encode_special(after)[0]}
  assert rendering.make('plain', tokenizer).ends == {tokenizer.eos_id}
  assert rendering.make('chat', tokenizer).ends is None


@pytest.mark.parametrize(
  'bad',
  [
    '{{ messages.__class__.__mro__ }}',
    '{{ "".__class__.__base__.__subclasses__() }}',
    '{{ cycler.__init__.__globals__.os.system("true") }}',
    '{{ messages.append(1) }}',
    '{{ messages[0].update(role="x") }}',
    '{% for i in range(10**9) %}{% endfor %}',
    '{% include "/etc/passwd" %}',
    '{{ 1 / 0 }}',
    '{{ open("/etc/passwd") }}',
  ],
)
def test_a_template_cannot_leave_its_sandbox(bad):
  with pytest.raises(ConfigError, match="the model's chat template says"):
    Template(bad, {}).text([{'role': USER, 'content': 'a'}])


def test_what_a_sandbox_hides_is_empty():
  text = (
    '{{ raise_exception.__globals__ }}{{ "".join.__self__ }}{{ messages.__class__ }}'
  )
  assert Template(text, {}).text([]) == ''


def test_a_damaged_template_is_named():
  with pytest.raises(ConfigError, match='chat template is damaged'):
    Template('{% for x in %}', {})


def test_a_template_that_writes_prompts_otherwise_is_refused():
  text = '{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}'
  with pytest.raises(ConfigError, match='what bears loss cannot be told'):
    Template(text, {}).render(CHAT)


def test_a_model_without_a_template_is_refused_before_it_is_loaded(monkeypatch):
  raw: Any = tiny.get_config()
  raw.data.format = 'template'
  with pytest.raises(
    ConfigError, match=r"config\.data\.format='template' is impossible"
  ):
    config.resolve(raw)
  raw.model.source = 'gemma3_270m'
  monkeypatch.setattr(base_model, 'load', None)
  monkeypatch.setattr(formats, 'chat_template', lambda source: '')
  with pytest.raises(
    ConfigError, match=r"data\.format='template' needs .* smollm2_135m"
  ):
    base_model.of_config(config.resolve(raw), None)


def test_a_tokenizer_of_ones_own_needs_special_tokens():
  class Letters:
    bos_id = 1

  with pytest.raises(ConfigError, match=r"data\.format='plain' needs .*encode_special"):
    rendering.make('plain', Letters())


def test_the_template_of_a_folder(tmp_path):
  from hetlora_jax.formats import hf_folder

  assert hf_folder.chat_template(tmp_path) == ''
  about = tmp_path / 'tokenizer_config.json'
  about.write_text('{"chat_template": null}')
  assert hf_folder.chat_template(tmp_path) == ''
  about.write_text('{"chat_template": "a"}')
  assert hf_folder.chat_template(tmp_path) == 'a'
  named = [{'name': 'tool', 'template': 'b'}, {'name': 'default', 'template': 'c'}]
  about.write_text(json.dumps({'chat_template': named}))
  assert hf_folder.chat_template(tmp_path) == 'c'
  (tmp_path / 'chat_template.jinja').write_text('d')
  assert hf_folder.chat_template(tmp_path) == 'd'
  (tmp_path / 'chat_template.jinja').unlink()
  about.write_text('{"chat_template": 3}')
  with pytest.raises(ValueError, match=r'tokenizer_config\.json is damaged'):
    hf_folder.chat_template(tmp_path)


def test_formats_are_the_fields_choices(tokenizer, tmp_path):
  ours = dataclasses.replace(tokenizer, chat_template=MODELS['gemma3']['template'])
  dataset = builders.open_dataset('synthetic', tmp_path)
  seen = set()
  for name in (None, *(config.FIELDS['data.format'].declaration.choices or ())):
    read = people.reader(dataset, ours, config.Data(format=name))
    seen.add(ours.decode(read(0).tokens))
  assert len(seen) == 4  # of five: the data set's own is with names


def test_a_completion_of_several_lines_goes_on_to_its_end(tokenizer):
  ends = rendering.make('plain', tokenizer).ends
  stop_V = generation.stop_token_mask(tokenizer, 300, ends)
  assert np.flatnonzero(stop_V).tolist() == [tokenizer.eos_id]
  line_V = generation.stop_token_mask(tokenizer, 300)
  assert line_V[tokenizer.encode('\n')].all()
