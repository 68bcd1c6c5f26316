"""The configuration of a run: sections of settings, loading them from TOML, validation and fingerprints.

Belongs here: what a user can configure, its validation, and which settings identify a run.
Does not belong here: code that needs torch, numpy, pyarrow or duckdb; the package must import in milliseconds.
"""

from ogls.config.data import Benchmark, Columns, DataSource, ProblemsConfig, PromptsConfig
from ogls.config.evaluation import EvaluateConfig, Verdict, VerifyConfig
from ogls.config.load import build_config, load_config, to_toml
from ogls.config.model import AdapterConfig, ModelConfig
from ogls.config.operations import (
    Action,
    ExecutionConfig,
    HealthConfig,
    StorageConfig,
    StyleConfig,
    TokenClass,
    TrackingConfig,
)
from ogls.config.run import RunConfig
from ogls.config.sampling import RolloutConfig, SamplingConfig, ServerConfig, VllmConfig
from ogls.config.section import Section, setting
from ogls.config.teacher import POOLS, READS, Pool, PoolConfig, Recipe, SteerConfig, TeacherConfig
from ogls.config.training import GrpoConfig, TrainConfig

__all__ = [
    "POOLS",
    "READS",
    "Action",
    "AdapterConfig",
    "Benchmark",
    "Columns",
    "DataSource",
    "EvaluateConfig",
    "ExecutionConfig",
    "GrpoConfig",
    "HealthConfig",
    "ModelConfig",
    "Pool",
    "PoolConfig",
    "ProblemsConfig",
    "PromptsConfig",
    "Recipe",
    "RolloutConfig",
    "RunConfig",
    "SamplingConfig",
    "Section",
    "ServerConfig",
    "SteerConfig",
    "StorageConfig",
    "StyleConfig",
    "TeacherConfig",
    "TokenClass",
    "TrackingConfig",
    "TrainConfig",
    "Verdict",
    "VerifyConfig",
    "VllmConfig",
    "build_config",
    "load_config",
    "setting",
    "to_toml",
]
