"""Templates for clusters: parsed, consistent, their command accepted."""

import math
import os
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml
from experiment_test import SMALL

from tests import programs

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / 'launch' / 'cluster'
MAIN_JOB = 'configs/chitchat_gemma3.py'
SHELL = ('slurm_multinode.sbatch', 'slurm_array.sbatch', 'tpu_vm.sh')
JOBSETS = ('gke_jobset_tpu.yaml', 'gke_jobset_gpu.yaml')
TEMPLATES = (*SHELL, *JOBSETS)
# What the cluster or the user sets.
GIVEN = {
  'CONFIG': 'configs/tiny.py', 'WORKDIR': '/runs/x', 'PROJECT': 'p',
  'REPOSITORY': 'r', 'SLURM_ARRAY_TASK_ID': '0', 'JOB_COMPLETION_INDEX': '1',
}  # fmt: skip
# Instead of running a program, say its words; gcloud's verbs to stderr.
STUBS = """
say() { printf '%s\\n' "$@"; }
srun() { while [ "$1" != python ]; do shift; done; say "$@"; }
gcloud() {
  say "$4" >&2
  if [[ $4 == describe ]]; then say "${SLICE-}"; fi
  for word; do case $word in
    --command=*launch.train*) eval "${word#*activate && }";; esac; done
}
python() { say python "$@"; }
exec() { "$@"; }
"""


def _run(*command, env=None):
  """Runs a command of a shell in the checkout."""
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
  assert done.returncode == 0, (shlex.join(command), done.stderr)
  return done


def _pod(name):
  """Returns a JobSet's only kind of job and its container."""
  (jobset,) = yaml.safe_load_all((FOLDER / name).read_text())
  assert (jobset['apiVersion'], jobset['kind']) == (
    'jobset.x-k8s.io/v1alpha2', 'JobSet',
  )  # fmt: skip
  assert jobset['spec']['failurePolicy']['maxRestarts'] > 0
  (group,) = jobset['spec']['replicatedJobs']
  job = group['template']['spec']
  (container,) = job['template']['spec']['containers']
  return jobset, job, container


def _script(name):
  """Returns what a shell runs, and the environment that the template sets."""
  if name in SHELL:
    return (FOLDER / name).read_text(), {}
  _, _, container = _pod(name)
  assert container['command'] == ['bash', '-c']
  (script,) = container['args']
  return script, {x['name']: x['value'] for x in container['env']}


def _shell(name, **given):
  """Runs a template's shell with stubs and nothing else in its environment."""
  script, env = _script(name)
  env = {'PATH': os.environ['PATH'], **env, **GIVEN, **given}
  return _run('bash', '-c', STUBS + script, env=env)


def words(name, **given):
  """Returns the words of the command that a template runs."""
  out = _shell(name, **given).stdout.splitlines()
  assert out[:2] == ['python', '-m'] and out[2].startswith('launch.'), out
  return out[1:]


def _mesh(command):
  """Returns how many devices a command's mesh has."""
  sizes = re.findall(r'--config\.mesh\.\w+=(\d+)', ' '.join(command))
  return math.prod(map(int, sizes))


@pytest.mark.parametrize('name', SHELL)
def test_scripts_are_bash(name):
  _run('bash', '-n', str(FOLDER / name))
  assert 'set -euo pipefail' in (FOLDER / name).read_text()


def test_every_template_is_tested():
  found = {path.name for path in FOLDER.iterdir()}
  assert found == set(TEMPLATES)


@pytest.mark.parametrize('name', TEMPLATES)
def test_a_template_names_nobodys_folder(name):
  text = (FOLDER / name).read_text()
  assert not re.search(r'/(home|Users|root|tmp)\b|~/', text)


@pytest.mark.parametrize('name', TEMPLATES)
def test_config_workdir_and_mesh_are_variables(name):
  default = _script(name)[1].get('CONFIG', '')
  assert f'--config={MAIN_JOB}' in words(name, CONFIG=default)
  command = words(name, WORKDIR='/a b', MESH_CLIENTS='3', MESH_MODEL='5')
  assert '--workdir=/a b' in command
  assert '--config=configs/tiny.py' in command
  if command[1] == 'launch.train':
    assert '--distributed' in command
    assert _mesh(command) == 15


@pytest.mark.parametrize(
  ('state', 'verbs'),
  [('', ['create']), ('READY', []), ('PREEMPTED', ['delete', 'create'])],
)
def test_a_tpu_slice_is_made_where_there_is_none(state, verbs):
  said = _shell('tpu_vm.sh', SLICE=state).stderr.splitlines()
  assert said == [*verbs, 'ssh', 'ssh']


@pytest.mark.parametrize('name', JOBSETS)
def test_a_jobsets_mesh_has_all_its_chips(name):
  jobset, job, container = _pod(name)
  (chips,) = container['resources']['limits'].values()
  assert job['completions'] == job['parallelism']
  assert job['completions'] * chips == _mesh(words(name))
  assert job['template']['spec']['terminationGracePeriodSeconds'] >= 120
  mounted = {mount['name'] for mount in container['volumeMounts']}
  assert mounted == {v['name'] for v in job['template']['spec']['volumes']}
  assert job['completionMode'] == 'Indexed'
  if 'gpu' in name:
    env = {x['name']: x['value'] for x in container['env']}
    assert int(env['PROCESSES']) == job['completions']
    first = f'{jobset["metadata"]["name"]}-workers-0-0'
    assert env['COORDINATOR'].startswith(f'{first}.{jobset["metadata"]["name"]}:')
  else:
    topology = job['template']['spec']['nodeSelector'][
      'cloud.google.com/gke-tpu-topology'
    ]
    assert math.prod(map(int, topology.split('x'))) == _mesh(words(name))


def _sbatch(name):
  """Returns the options of a batch script."""
  text = (FOLDER / name).read_text()
  return dict(re.findall(r'^#SBATCH --([\w-]+)(?:=(\S+))?$', text, re.M))


def test_the_multinode_mesh_has_all_gpus():
  options = _sbatch('slurm_multinode.sbatch')
  per_node = int(options['ntasks-per-node'])
  assert per_node == int(options['gpus-per-node'])
  assert int(options['nodes']) * per_node == _mesh(words('slurm_multinode.sbatch'))
  assert 'requeue' in options


@pytest.mark.parametrize('name', SHELL[:2])
def test_a_job_has_a_time_limit_and_time_to_save(name):
  options = _sbatch(name)
  hours, minutes, seconds = map(int, options['time'].split(':'))
  signal, before = options['signal'].split('@')
  assert signal == 'TERM'
  assert 120 <= int(before) < 3600 * hours + 60 * minutes + seconds
  assert options['open-mode'] == 'append'  # what went on keeps its log


def test_the_array_has_a_task_for_every_program():
  command = [
    word for word in words('slurm_array.sbatch') if not word.startswith('--group')
  ]
  done = programs.run(*command[1:], '--print')
  assert not done.returncode, done.stderr
  last = len(done.stdout.splitlines()) - 1
  assert _sbatch('slurm_array.sbatch')['array'] == f'0-{last}'


@pytest.mark.parametrize(
  'name',
  # By default one of several hosts and one of a sweep.
  [
    *SHELL[:2],
    *(pytest.param(name, marks=pytest.mark.slow) for name in TEMPLATES[2:]),
  ],
)
def test_the_command_is_accepted(name):
  command = words(name)
  small = [f'--config.{k}={v}' for k, v in SMALL.items() if 'clients' not in k]
  small = (*command[1:], *small, '--dry_run')
  done = programs.run(*small, XLA_FLAGS=programs.ONE_DEVICE)
  assert not done.returncode, done.stderr
  assert f'= {_mesh(command)} devices' in done.stdout
