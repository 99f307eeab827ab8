"""Settings: defaults, casts, and errors that name the setting."""

import pytest

from bemore.settings import ConfigError, Settings, read_settings, similar_settings


def test_without_settings_a_hobbyist_gets_sqlite_and_the_demo() -> None:
    settings = read_settings({})
    assert settings.sqlite
    assert settings.demo
    assert settings.auto_create_sessions
    assert (settings.host, settings.port, settings.database_url) == ("127.0.0.1", 8000, "sqlite:///bemore.db")
    assert settings.allowed_origins == {"http://localhost:5173"}
    assert (settings.gemini_model, settings.gemini_max_output_tokens) == ("gemini-3.5-flash-lite", 200)
    assert settings.gemini_thinking_level == "minimal"
    assert settings.gemini_fallback_model == ""
    assert (settings.max_ai_requests_per_minute, settings.stream_chunk_interval_ms) == (10, 50)
    assert not settings.barge_in
    timeouts = (settings.first_chunk_timeout_seconds, settings.chunk_timeout_seconds, settings.reply_timeout_seconds)
    assert (*timeouts, settings.database_timeout_seconds) == (15, 10, 60, 5)


def test_empty_values_mean_the_default() -> None:
    names = ("HOST", "PORT", "DATABASE_URL", "GEMINI_MODEL", "BARGE_IN", "ALLOWED_ORIGINS", "LOG_LEVEL")
    assert read_settings(dict.fromkeys(names, " ")) == read_settings({})


def test_an_empty_thinking_level_sends_none() -> None:
    assert read_settings({"GEMINI_THINKING_LEVEL": ""}).gemini_thinking_level == ""


@pytest.mark.parametrize(
    ("value", "expected"), [("1", True), ("YES", True), ("on", True), ("False", False), ("0", False)]
)
def test_switches_take_the_usual_words(value: str, expected: bool) -> None:
    assert read_settings({"BARGE_IN": value}).barge_in is expected


def test_sessions_are_not_created_on_connect_with_postgres() -> None:
    settings = read_settings({"DATABASE_URL": "postgresql://h/d", "DEMO_MODE": "1"})
    assert not settings.auto_create_sessions


def test_demo_mode_wins_over_a_key() -> None:
    assert read_settings({"GEMINI_API_KEY": "k", "DEMO_MODE": "1"}).demo
    assert not read_settings({"GEMINI_API_KEY": "k"}).demo


def test_a_server_of_ones_own_needs_no_key_and_wins_over_gemini() -> None:
    values = {"OPENAI_BASE_URL": "http://localhost:11434/v1/", "OPENAI_MODEL": "hf.co/org/qwen3:8b-Q4_K_M"}
    settings = read_settings({**values, "GEMINI_API_KEY": "k", "DATABASE_URL": "postgres://h/d"})
    assert not settings.demo
    assert (settings.openai_base_url, settings.openai_model) == ("http://localhost:11434/v1", values["OPENAI_MODEL"])
    assert settings.openai_api_key == ""
    with pytest.raises(ConfigError, match=r"^OPENAI_MODEL: takes "):
        read_settings({"OPENAI_BASE_URL": "http://localhost:11434/v1"})


@pytest.mark.parametrize("quote", ['"', "'"])
def test_quotes_around_a_value_are_taken_off(quote: str) -> None:
    """docker --env-file leaves them there."""
    values = {"GEMINI_API_KEY": "AIza-x", "GEMINI_THINKING_LEVEL": "low", "PORT": "81", "LOG_LEVEL": ""}
    assert read_settings({name: f"{quote}{value}{quote}" for name, value in values.items()}) == read_settings(values)
    assert read_settings({"GEMINI_API_KEY": f"{quote}k"}).gemini_api_key == f"{quote}k"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "eighty"),
        ("OPENAI_BASE_URL", "localhost:11434/v1"),
        ("OPENAI_BASE_URL", "http://user:hush@host/v1"),
        ("OPENAI_MODEL", "a model"),
        ("OPENAI_API_KEY", "열쇠"),
        ("PORT", "65536"),
        ("PORT", "80.5"),
        ("DATABASE_URL", "mysql://localhost/db"),
        ("DATABASE_URL", "sqlite:///"),
        ("GEMINI_API_KEY", "키"),
        ("GEMINI_BASE_URL", "generativelanguage.googleapis.com"),
        ("GEMINI_BASE_URL", "http://user:hush@host"),
        ("GEMINI_MODEL", "a model/../other"),
        ("GEMINI_FALLBACK_MODEL", "a model/../other"),
        ("GEMINI_MAX_OUTPUT_TOKENS", "0"),
        ("GEMINI_THINKING_LEVEL", "deep"),
        ("SESSION_TTL_HOURS", "0"),
        ("ALLOWED_ORIGINS", "localhost:5173"),
        ("ALLOWED_ORIGINS", "https://app.example/page"),
        ("TRUST_PROXY", "10.0.0.1"),
        ("MAX_CONNECTIONS", "0"),
        ("MAX_NEW_SESSIONS_PER_MINUTE", "-1"),
        ("MAX_AI_REQUESTS_PER_MINUTE", "0"),
        ("STREAM_CHUNK_INTERVAL_MS", "-1"),
        ("BARGE_IN", "maybe"),
        ("AUTO_CREATE_SESSIONS", "2"),
        ("FIRST_CHUNK_TIMEOUT_SECONDS", "nan"),
        ("CHUNK_TIMEOUT_SECONDS", "inf"),
        ("REPLY_TIMEOUT_SECONDS", "-5"),
        ("DATABASE_TIMEOUT_SECONDS", "5s"),
        ("NOTICE_URL", "/privacy"),
        ("NOTICE_URL", "javascript:alert(1)"),
        ("NOTICE_URL", "https://app.example/a b"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_an_unreadable_value_is_named_with_what_it_takes(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings({name: value})
    assert str(caught.value).startswith(f"{name}: takes ")
    assert "\n" not in str(caught.value)
    assert "hush" not in str(caught.value)


def test_postgres_without_a_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^GEMINI_API_KEY: "):
        read_settings({"DATABASE_URL": "postgres://u:hush@h/d"})


@pytest.mark.parametrize("secret", ["", "short", f"{'long' * 8},short"])
def test_required_tokens_need_a_secret_of_32_bytes(secret: str) -> None:
    with pytest.raises(ConfigError, match=r"^JWT_SECRET_KEY: "):
        read_settings({"REQUIRE_SESSION_TOKEN": "1", "JWT_SECRET_KEY": secret})


def test_secrets_do_not_show_in_a_repr() -> None:
    secrets = {
        "GEMINI_API_KEY": "hush1",
        "JWT_SECRET_KEY": "hush2",
        "OPENAI_API_KEY": "hush4",
        "DATABASE_URL": "postgres://u:hush3@h/d",
    }
    settings = read_settings(secrets)
    assert isinstance(settings, Settings)
    assert "hush" not in repr(settings)


def test_seconds_may_be_fractions() -> None:
    assert read_settings({"CHUNK_TIMEOUT_SECONDS": "0.25"}).chunk_timeout_seconds == 0.25


def test_several_secrets_are_separated_by_commas() -> None:
    settings = read_settings({"JWT_SECRET_KEY": f" {'a' * 32} ,{'b' * 32},"})
    assert settings.jwt_secret_key == ("a" * 32, "b" * 32)
    assert not settings.weak_secret


@pytest.mark.parametrize(("secrets", "weak"), [("", False), ("a" * 31, True), (f"{'a' * 32},b", True)])
def test_each_secret_is_checked_for_weakness(secrets: str, weak: bool) -> None:
    assert read_settings({"JWT_SECRET_KEY": secrets}).weak_secret is weak


def test_the_page_of_a_privacy_notice_is_an_http_url() -> None:
    assert read_settings({}).notice_url == ""
    assert read_settings({"NOTICE_URL": "https://app.example/privacy?l=ko"}).notice_url.endswith("?l=ko")


def test_names_that_resemble_a_setting_are_found() -> None:
    found = similar_settings(["GEMINI_KEY", "ALLOWED_ORIGIN", "port", "PORT", "PATH", "HOSTNAME", "POSTGRES_PASSWORD"])
    assert found == {"GEMINI_KEY": "GEMINI_API_KEY", "ALLOWED_ORIGIN": "ALLOWED_ORIGINS", "port": "PORT"}
