"""Settings: everything the application reads from its environment, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

REPOSITORY = Path(__file__).resolve().parents[2]


class Settings(BaseSettings):
    """Read from environment variables of the same names in upper case, those of ours prefixed `PLM_`.

    Secrets come from the environment only: `PG_DSN`, `PG_ADMIN_DSN` and the identity secrets never stand in a file of
    ours, an argument or a log.
    """

    model_config = SettingsConfigDict(env_prefix="PLM_", extra="ignore")

    environment: str = Field(default="development", validation_alias="ENVIRONMENT")
    pg_dsn: str | None = Field(default=None, validation_alias="PG_DSN", repr=False)
    pg_admin_dsn: str | None = Field(default=None, validation_alias="PG_ADMIN_DSN", repr=False)
    state_dir: Path = REPOSITORY / ".state"
    policy: Path = REPOSITORY / "dev" / "policy.yaml"
    capabilities: Path = REPOSITORY / "dev" / "capabilities.yaml"
    agents: Path = REPOSITORY / "dev" / "agents"
    agent_register: Path | None = None
    """The register of agents with their ceilings; with one, no agent that is not in it may propose anything."""

    artifacts: str | None = Field(default=None, validation_alias=AliasChoices("PLM_ARTIFACTS", "PLM_ARTIFACTS_DIR"))
    """Where the files of runs are kept: a folder, or s3://bucket?endpoint=URL, which every node can reach."""

    plugins_dir: Path | None = None
    events_key: Path | None = None
    """The private key that signs the event streams' checkpoints (PEM, mode 0600); in development one is made."""

    events_archive: str | None = None
    """Where signed exports are kept continuously: a folder, or s3://bucket?endpoint=URL; best out of this machine."""

    audit_required: bool = True
    """Whether a request whose audit record cannot be written is refused (503) rather than served and logged."""

    host: str = "127.0.0.1"
    port: int | None = Field(default=None, ge=0, le=65535)
    """0 takes a free port; when none is named, 8000, or a free one when that is in use."""

    lease_seconds: float = Field(default=30.0, ge=0.5, le=3600)
    recovery_seconds: float = Field(default=10.0, ge=0.2, le=3600)
    checkpoint_seconds: float = Field(default=60.0, ge=0.2, le=86_400)
    """How often a checkpoint of what happened is signed."""

    archive_seconds: float = Field(default=3600.0, ge=0.2, le=86_400)
    """How often what was signed is added to the archive, and what a tenant's retention lets go is pruned."""

    artifact_grace_seconds: float = Field(default=86_400.0, ge=3600)
    """How long a stored file may be without its record before it is removed as a stray; longer than any upload."""

    idempotency_seconds: float = Field(default=30 * 86_400.0, ge=86_400)
    """How long after the end of a run its Idempotency-Key still answers with it; later the key makes a new run."""

    patience_seconds: float = Field(default=30.0, ge=0.5, le=3600)
    """An enqueued run that no run worker took for so long is enqueued once more: its job may be lost."""

    database_patience_seconds: float = Field(default=60.0, ge=0.5, le=86_400)
    """A run worker that cannot reach the database for so long ends; an API waits for ever, and answers 503."""

    run_concurrency: int = Field(default=8, ge=0, le=256)
    """Runs this process drives at once; 0 leaves them to the run workers of other processes."""

    plugin_concurrency: int = Field(default=1, ge=1, le=64)
    plugin_tenant_workers: int = Field(default=16, ge=1, le=1024)
    """How many tenants a plugin serves at once on this node, each in a worker of its own."""

    plugin_require: Annotated[tuple[str, ...], NoDecode] = ()
    """Layers of confinement, like `landlock:4,seccomp`, without which no plugin is started; see `cjm-ctl doctor`."""

    plugins_confidential: Annotated[tuple[str, ...], NoDecode] = ()
    """Plugins that handle secrets of a run: each of its runs gets a worker of its own, which ends with it."""

    max_body_bytes: int = Field(default=32 * 1024 * 1024, ge=1024)
    cors_allowed_origins: Annotated[tuple[str, ...], NoDecode] = ()

    @field_validator("cors_allowed_origins", "plugin_require", "plugins_confidential", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("cors_allowed_origins")
    @classmethod
    def _names_its_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "*" in value:
            raise ValueError("'*' would let every page read every tenant; name the origins")
        return value

    @field_validator("plugin_require")
    @classmethod
    def _are_layers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            return value
        from plugin_substrate.worker.isolation import parse_required_layers

        problems: list[str] = []
        parse_required_layers(list(value), "the list", problems)
        if problems:
            raise ValueError("; ".join(problems))
        return value

    @property
    def development(self) -> bool:
        """Whether conveniences such as the embedded database are allowed."""
        return self.environment.strip().casefold() == "development"

    @property
    def artifact_store(self) -> str:
        """Where the files of runs are kept, by default below the state folder."""
        return self.artifacts or str(self.state_dir / "artifacts")

    @property
    def plugin_root(self) -> Path:
        """Where plugin environments, manifests and data live."""
        return self.plugins_dir or self.state_dir / "plugins"
