"""Writes tests/golden/chat_templates.json: chats as transformers renders them.

  pip download --no-deps trl==1.16.0 --dest /tmp/trl
  .venv-bench/bin/python -m tests.make_chat_templates /tmp/trl/trl-*.whl

Templates are those of TRL's wheel (Apache-2.0), which has them as models publish
them, and of the GGUF file of SmolLM2 (Apache-2.0) in the cache; that of Mistral 7B
Instruct is written here in its manner. `ids` are those of the tokenizers that
transformers reads from the GGUF files of SmolLM2 and Gemma 3.
"""

import datetime
import json
import pathlib
import sys
import zipfile

import gguf
import tokenizers
import transformers
from transformers.utils import chat_template_utils

OUT = pathlib.Path(__file__).with_name('golden') / 'chat_templates.json'
CACHE = pathlib.Path('~/.cache/hetlora_jax').expanduser()
SMOLLM2 = 'SmolLM2-135M-Instruct.Q4_1.gguf'
GEMMA = 'gemma-3-270m-q4_k_m.gguf'
# Name -> file in TRL's wheel, bos, eos.
MODELS = {
  'gemma3': ('gemma3', '<bos>', '<eos>'),
  'llama3_2': ('llama3_2', '<|begin_of_text|>', '<|eot_id|>'),
  'qwen2_5': ('qwen2_5', '<|endoftext|>', '<|im_end|>'),
  'qwen3': ('qwen3', '<|endoftext|>', '<|im_end|>'),
  'phi3': ('phi3', '<s>', '<|endoftext|>'),
  'llama3_training': ('llama3_training', '<|begin_of_text|>', '<|eot_id|>'),
}
MISTRAL = """{{ bos_token }}{% for message in messages -%}
  {% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Roles must alternate user and assistant, the user first') }}
  {% endif %}
  {% if message.role == 'user' %}
    {{- '[INST] ' + message.content + ' [/INST]' }}
  {%- else %}
    {{- ' ' + message.content.strip() + eos_token }}
  {%- endif %}
{% endfor %}"""
U, A, S = 'user', 'assistant', 'system'
CHATS = [
  [(U, 'How are you?'), (A, 'Fine, thanks.')],
  [(U, ' Two\nlines \n'), (A, 'Yes <b> & "so" é 😀'), (U, 'And?'), (A, 'No.')],
  [(S, 'Be brief.'), (U, 'Hi'), (A, 'Oh'), (U, 'Hm'), (A, 'Ah')],
  [(A, 'I begin.'), (U, 'You do.'), (A, 'I did.')],
]


class Day(datetime.datetime):
  """Always the day that `rendering` gives templates."""

  @classmethod
  def now(cls, tz=None):
    return cls(2024, 7, 26, tzinfo=tz)


def _rendered(tokenizer, chat: list) -> list[dict]:
  """Returns a chat whole, and its prompt, or what the template says of it."""
  out = []
  messages = [{'role': role, 'content': text} for role, text in chat]
  for prompt in (False, True):
    case = {'messages': messages[:-1] if prompt else messages, 'prompt': prompt}
    try:
      case['text'] = tokenizer.apply_chat_template(
        case['messages'], tokenize=False, add_generation_prompt=prompt
      )
    except Exception as error:  # as templates raise
      case['error'] = str(error)
    out.append(case)
  return out


def _templates(wheel: str) -> dict[str, tuple[str, str, str]]:
  with zipfile.ZipFile(wheel) as archive:
    found = {
      name: (archive.read(f'trl/chat_templates/{file}.jinja').decode(), bos, eos)
      for name, (file, bos, eos) in MODELS.items()
    }
  field = gguf.GGUFReader(CACHE / SMOLLM2).fields['tokenizer.chat_template']
  smollm2 = bytes(field.parts[field.data[0]]).decode()
  found['smollm2'] = (smollm2, '<|im_start|>', '<|im_end|>')
  found['mistral'] = (MISTRAL, '<s>', '</s>')
  return found


def main(wheel: str) -> None:
  chat_template_utils.datetime = Day
  out, templates = {}, _templates(wheel)
  for name, (text, bos, eos) in templates.items():
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer = transformers.PreTrainedTokenizerFast(
      tokenizer_object=empty, bos_token=bos, eos_token=eos, chat_template=text
    )
    cases = [case for chat in CHATS for case in _rendered(tokenizer, chat)]
    out[name] = {
      'template': text, 'bos_token': bos, 'eos_token': eos, 'cases': cases
    }  # fmt: skip
  for name, file in (('smollm2', SMOLLM2), ('gemma3', GEMMA)):
    tokenizer = transformers.AutoTokenizer.from_pretrained(CACHE, gguf_file=file)
    for case in out[name]['cases']:
      if 'text' in case:
        case['ids'] = tokenizer(case['text'], add_special_tokens=False).input_ids
  OUT.write_text(json.dumps(out, indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
  main(sys.argv[1])
