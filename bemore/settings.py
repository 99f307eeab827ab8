"""The settings: read once, from a mapping that is passed in, cast and checked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from dotenv import dotenv_values

MIN_SECRET_BYTES = 32  # HS256's own length (RFC 7518, 3.2); a shorter secret can be guessed


class ConfigError(Exception):
    """One line that tells an operator which setting to mend, and what it takes."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the environment says, checked; see .env.example for the meaning of each."""

    host: str
    port: int
    database_url: str = field(repr=False)
    gemini_api_key: str = field(repr=False)
    gemini_base_url: str
    gemini_model: str
    gemini_fallback_model: str
    gemini_max_output_tokens: int
    gemini_thinking_level: str
    openai_base_url: str
    openai_model: str
    openai_api_key: str = field(repr=False)
    # The first secret signs, all verify.
    jwt_secret_key: tuple[str, ...] = field(repr=False)
    require_session_token: bool
    session_ttl_hours: float
    allowed_origins: frozenset[str]
    trust_proxy: bool
    max_connections: int
    max_new_sessions_per_minute: int
    max_ai_requests_per_minute: int
    stream_chunk_interval_ms: int
    barge_in: bool
    auto_create_sessions: bool
    demo_mode: bool
    notice_url: str
    first_chunk_timeout_seconds: float
    chunk_timeout_seconds: float
    reply_timeout_seconds: float
    database_timeout_seconds: float
    keep_days: float
    log_level: str

    @property
    def sqlite(self) -> bool:
        return self.database_url.startswith("sqlite:")

    @property
    def demo(self) -> bool:
        return self.demo_mode or not (self.gemini_api_key or self.openai_base_url)

    @property
    def weak_secret(self) -> bool:
        return any(len(secret.encode()) < MIN_SECRET_BYTES for secret in self.jwt_secret_key)


SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def unquote(value: str) -> str:
    """Return a value without the quotes around it; docker's --env-file leaves them there."""
    return value[1:-1].strip() if re.fullmatch(r"""(["']).*\1""", value, re.DOTALL) else value


class SettingsReader:
    """Cast named values; an empty one means the default, one that cannot be read raises ConfigError."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def text(self, name: str, default: str = "") -> str:
        return unquote(self._values.get(name, "").strip()) or default

    def matching(self, name: str, default: str, pattern: str, takes: str, *, secret: bool = False) -> str:
        value = self.text(name, default)
        if not re.fullmatch(pattern, value):
            raise ConfigError(f"{name}: takes {takes}" + ("" if secret else f", got {value!r}"))
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.text(name, str(default))
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not low <= number <= high:  # also false for "nan"
            raise ConfigError(f"{name}: takes a number from {low:g} to {high:g}, got {value!r}")
        return number

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        number = self.number(name, default, low, high)
        if not number.is_integer():
            raise ConfigError(f"{name}: takes a whole number from {low} to {high}, got {number!r}")
        return int(number)

    def switch(self, name: str, default: bool) -> bool:
        value = self.text(name, str(default)).lower()
        if value not in SWITCHES:
            raise ConfigError(f"{name}: takes one of {' '.join(SWITCHES)}, got {value!r}")
        return SWITCHES[value]

    def secrets(self, name: str) -> tuple[str, ...]:
        return tuple(secret for part in self.text(name).split(",") if (secret := part.strip()))

    def origins(self, name: str, default: str) -> frozenset[str]:
        origins = frozenset(part.strip().rstrip("/").lower() for part in self.text(name, default).split(","))
        for origin in origins - {""}:
            if not re.fullmatch(r"https?://[^/?#@\s]+", origin):
                raise ConfigError(f"{name}: takes origins such as https://app.example, got {origin!r}")
        return origins - {""}


def read_settings(values: Mapping[str, str]) -> Settings:
    """Read and check all settings from `values`; raise ConfigError with one line that names the first bad one."""
    read = SettingsReader(values)
    database_url = read.matching(
        "DATABASE_URL",
        "sqlite:///bemore.db",
        r"sqlite:///.+|postgres(ql)?://.*",
        "sqlite:///file.db or postgresql://user:password@host/name",
        secret=True,
    )
    settings = Settings(
        host=read.text("HOST", "127.0.0.1"),
        port=read.integer("PORT", 8000, 0, 65535),
        database_url=database_url,
        gemini_api_key=read.matching("GEMINI_API_KEY", "", r"[!-~]*", "a key of printable ASCII", secret=True),
        gemini_base_url=read.matching(
            "GEMINI_BASE_URL",
            "https://generativelanguage.googleapis.com/v1beta",
            r"https?://[^\s?#@]+",
            "an http(s) URL without query or credentials",
            secret=True,
        ).rstrip("/"),
        gemini_model=read.matching("GEMINI_MODEL", "gemini-3.5-flash-lite", r"[\w.-]+", "a model's name"),
        gemini_fallback_model=read.matching("GEMINI_FALLBACK_MODEL", "", r"[\w.-]*", "a model's name"),
        gemini_max_output_tokens=read.integer("GEMINI_MAX_OUTPUT_TOKENS", 200, 1, 65536),
        # The one setting whose empty value is not its default: it sends no level at all.
        gemini_thinking_level=unquote(values.get("GEMINI_THINKING_LEVEL", "minimal").strip()).lower(),
        openai_base_url=read.matching(
            "OPENAI_BASE_URL", "", r"(https?://[^\s?#@]+)?", "an http(s) URL without query or credentials", secret=True
        ).rstrip("/"),
        openai_model=read.matching("OPENAI_MODEL", "", r"[!-~]*", "a model's name"),
        openai_api_key=read.matching("OPENAI_API_KEY", "", r"[!-~]*", "a key of printable ASCII", secret=True),
        jwt_secret_key=read.secrets("JWT_SECRET_KEY"),
        require_session_token=read.switch("REQUIRE_SESSION_TOKEN", False),
        session_ttl_hours=read.number("SESSION_TTL_HOURS", 24, 0.01, 8760),
        allowed_origins=read.origins("ALLOWED_ORIGINS", "http://localhost:5173"),
        trust_proxy=read.switch("TRUST_PROXY", False),
        max_connections=read.integer("MAX_CONNECTIONS", 10_000, 1, 1_000_000),
        max_new_sessions_per_minute=read.integer("MAX_NEW_SESSIONS_PER_MINUTE", 60, 1, 60_000),
        max_ai_requests_per_minute=read.integer("MAX_AI_REQUESTS_PER_MINUTE", 10, 1, 6000),
        stream_chunk_interval_ms=read.integer("STREAM_CHUNK_INTERVAL_MS", 50, 0, 5000),
        barge_in=read.switch("BARGE_IN", False),
        auto_create_sessions=read.switch("AUTO_CREATE_SESSIONS", database_url.startswith("sqlite:")),
        demo_mode=read.switch("DEMO_MODE", False),
        notice_url=read.matching("NOTICE_URL", "", r"(https?://[^\s/]\S*)?", "an http(s) URL"),
        first_chunk_timeout_seconds=read.number("FIRST_CHUNK_TIMEOUT_SECONDS", 15, 0.01, 600),
        chunk_timeout_seconds=read.number("CHUNK_TIMEOUT_SECONDS", 10, 0.01, 600),
        reply_timeout_seconds=read.number("REPLY_TIMEOUT_SECONDS", 60, 0.01, 600),
        database_timeout_seconds=read.number("DATABASE_TIMEOUT_SECONDS", 5, 0.01, 600),
        keep_days=read.number("KEEP_DAYS", 0, 0, 36_500),
        log_level=read.matching("LOG_LEVEL", "info", "(?i:debug|info|warning|error)", "debug, info, warning or error"),
    )
    if settings.gemini_thinking_level not in ("", "minimal", "low", "medium", "high"):
        raise ConfigError("GEMINI_THINKING_LEVEL: takes minimal, low, medium, high or nothing at all")
    if settings.require_session_token and (settings.weak_secret or not settings.jwt_secret_key):
        raise ConfigError(f"JWT_SECRET_KEY: takes at least {MIN_SECRET_BYTES} bytes when REQUIRE_SESSION_TOKEN is on")
    if settings.openai_base_url and not settings.openai_model:
        raise ConfigError("OPENAI_MODEL: takes the name of a model of the server at OPENAI_BASE_URL")
    if settings.demo and not settings.demo_mode and not settings.sqlite:
        raise ConfigError("GEMINI_API_KEY: needed with Postgres, or OPENAI_BASE_URL, or DEMO_MODE=1 for canned replies")
    return settings


def similar_settings(names: Iterable[str]) -> dict[str, str]:
    """Return the names that are no setting but resemble one, each with that setting."""
    known = [field.name.upper() for field in fields(Settings)]
    unknown = set(names) - set(known)
    found = {name: difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8) for name in sorted(unknown)}
    return {name: close[0] for name, close in found.items() if close}


def read_dotenv() -> dict[str, str]:
    """Return what .env in the folder of the start says; it need not be there."""
    try:
        return {name: value for name, value in dotenv_values(".env").items() if value is not None}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f".env: takes UTF-8 text that this user may read ({type(error).__name__})") from None
