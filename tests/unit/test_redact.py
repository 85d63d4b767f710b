"""Secrets in texts that are kept or shown: the formats that services give their keys, names, headers; and what is none."""

import base64
import json

import pytest

from ftray.redact import holds_secret, redacted, redacted_tree, without_shapes

HEX, WORD = "0123456789abcdef" * 4, "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7" * 4


def b64(tree: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(tree).encode()).decode().rstrip("=")


JWT = f"{b64({'alg': 'HS256', 'typ': 'JWT'})}.{b64({'sub': '1234567890', 'name': 'Ann'})}.{WORD[:43]}"
PEM = f"-----BEGIN RSA PRIVATE KEY-----\n{WORD}\n{WORD}\n-----END RSA PRIVATE KEY-----"
# Put together here, so that no scanner takes this file for a leak.
KEYS = {
    "GitHub": [f"gh{kind}_{WORD[:36]}" for kind in "pousr"] + [f"github_pat_{WORD[:22]}_{WORD[:59]}"],
    "GitLab": [f"glpat-{WORD[:20]}", f"glrt-{WORD[:20]}", f"gldt-{WORD[:20]}", f"glpat-{WORD[:27]}.01.{WORD[:9]}"],
    "Slack": [f"xox{kind}-123456789012-{WORD[:24]}" for kind in "abprse"] + [f"xapp-1-A0123-{WORD[:30]}"],
    "OpenAI": [f"sk-{WORD[:48]}", f"sk-proj-{WORD[:60]}", f"sk-svcacct-{WORD[:60]}"],
    "Anthropic": [f"sk-ant-api03-{WORD[:60]}"],
    "Hugging Face": [f"hf_{WORD[:34]}"],
    "AWS": ["AKIA" + "IOSFODNN7EXAMPL2", "ASIA" + "IOSFODNN7EXAMPL2"],
    "Google": [f"AIza{WORD[:35]}", f"ya29.{WORD[:60]}", f"GOCSPX-{WORD[:28]}"],
    "Stripe": [f"sk_live_{WORD[:24]}", f"rk_test_{WORD[:24]}", f"pk_live_{WORD[:24]}", f"whsec_{WORD[:32]}"],
    "npm": [f"npm_{WORD[:36]}"],
    "PyPI": [f"pypi-AgEI{WORD[:80]}"],
    "others": [f"dckr_pat_{WORD[:27]}", f"dapi{HEX[:32]}", f"SG.{WORD[:22]}.{WORD[:43]}", f"hvs.{WORD[:24]}", f"gsk_{WORD[:52]}"],
    "JSON web tokens": [JWT, f"{b64({'enc': 'A256GCM', 'alg': 'dir'})}..{WORD[:16]}.{WORD[:40]}.{WORD[:22]}"],
    "private keys": [PEM, PEM.replace("RSA ", ""), PEM.replace("RSA", "OPENSSH"), PEM.partition("-----END")[0]],
}  # fmt: skip


@pytest.mark.parametrize("service", KEYS)
def test_a_key_goes_by_its_format_wherever_it_stands(service: str) -> None:
    for key in KEYS[service]:
        for text in (key, f"the key {key}", f'{{"x": "{key}"}}', f"x={key}&y=1", f"({key}), then", f"a\n{key}"):
            shown = without_shapes(text)
            assert key[8:] not in shown, (key, shown)
            assert "…" in shown
            assert holds_secret(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("MYSQL_PWD=hunter22", "MYSQL_PWD=…"),
        ("export DB_PASSWORD='correct horse'", "export DB_PASSWORD=…"),
        ("PGPASSWORD=hunter22 psql", "PGPASSWORD=… psql"),
        ("AWS_SECRET_ACCESS_KEY = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "AWS_SECRET_ACCESS_KEY = …"),
        ("SECRET_KEY_BASE=abcdef123", "SECRET_KEY_BASE=…"),
        ("GITHUB_TOKEN_2=abcdef123,x", "GITHUB_TOKEN_2=…,x"),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCY", "aws_secret_access_key = …"),
        ('{"api_key": "abcd-efgh", "n": 1}', '{"api_key": …, "n": 1}'),
        (r"body: {\"api_key\": \"abcd-efgh\", \"n\": 1}", r"body: {\"api_key\": …, \"n\": 1}"),
        ("--db-password hunter22 --steps 3", "--db-password … --steps 3"),
        ("Cookie: session=abcdef123456; csrf=ghijkl987", "Cookie: …"),
        ("--db-password=hunter22 --steps 3", "--db-password=… --steps 3"),
        ("client_secret: abcdefgh", "client_secret: …"),
        ("Authorization: Bearer abcdefghi", "Authorization: Bearer …"),
        ("authorization: Basic dXNlcjpwYXNz", "authorization: Basic …"),
        ("{'Authorization': 'token abcdefgh'}", "{'Authorization': 'token …'}"),
        ("X-Api-Key: abcdefgh", "X-Api-Key: …"),
        ("PRIVATE-TOKEN: abcdefgh", "PRIVATE-TOKEN: …"),
        ("Cookie: session=abcdefgh; x=1", "Cookie: …"),
        ("https://ann:pa:ss@x.org/a", "https://…@x.org/a"),
        ("https://ghost@x.org/a", "https://…@x.org/a"),
    ],
)
def test_what_a_name_or_a_header_says_is_secret_goes(text: str, shown: str) -> None:
    assert without_shapes(text).startswith(shown)


@pytest.mark.parametrize(
    "text",
    [
        "max_tokens=512 tokens_per_day: 100000 num_virtual_tokens=20",
        "MAX_TOKENS=512 NUM_TOKENS=4096 TOKENIZERS_PARALLELISM=false",
        "PWD=/home/ann/work OLDPWD=/home/ann",
        "FTRAY_API_KEY_FILE=/run/secrets/keys SSL_KEY_PATH=/etc/x.pem",
        "set FTRAY_API_KEY (several keys: separated by commas)",
        "token_accuracy: 0.91, first_token_seconds=0.25",
        "eos_token=<|end|> pad_token: <pad> stop_token_ids=[2]",
        "sort_key=position keyboard=german monkey=banana",
        "sorted(x, key=len)",
        "api_key_env: JUDGE_KEY",
        "password: null",
        "the authorization of users is a topic; cookies: none",
        "train.learning_rate=0.0002 config hash 0123456789abcdef0123456789abcdef",
        "sha256 " + HEX,
        "commit " + HEX[:40],
        "sk-learn-classifier-of-topics",
        "glpat- is how tokens of GitLab begin, xoxb- those of Slack, eyJ those of the web",
        "dapi-compatible endpoints, npm_config_cache=/tmp/npm",
        "s3://bucket/runs/tiny/checkpoints/step-000100",
        "serve.trusted_keys=[ed25519:MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=]",
        "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----",
        "http://127.0.0.1:9000/a@b at 10:30",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert without_shapes(text) == text


def test_values_of_the_environment_go_by_their_variables_names(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = [
        "MYSQL_PWD",
        "DB_PASSWORD_PROD",
        "GITHUB_TOKEN_2",
        "SECRET_KEY_BASE",
        "X_PASSPHRASE",
        "OPENAI_APIKEY",
        "npm_config__auth",
    ]
    for number, name in enumerate(secret):
        monkeypatch.setenv(name, f"Value-{number}-of-it")
    common = {
        "OLDPWD": "/home/Ann-1",
        "MAX_TOKENS": "1234567890",
        "TOKENIZERS_X": "Parallel-1",
        "A_KEY_FILE": "/Run-1/keys",
    }
    for name, value in common.items():
        monkeypatch.setenv(name, value)
    text = " ".join([*(f"Value-{number}-of-it" for number in range(len(secret))), *common.values()])
    assert redacted(text) == " ".join(["…"] * len(secret) + [*common.values()])


def test_a_tree_loses_texts_under_secret_keys() -> None:
    tree = {
        "password": "x",
        "api_key": "y",
        "nested": [{"client_secret": "z"}],
        "max_tokens": 3,
        "eos_token": "<end>",
        "n": {"password": ""},
    }
    kept = {
        "password": "…",
        "api_key": "…",
        "nested": [{"client_secret": "…"}],
        "max_tokens": 3,
        "eos_token": "<end>",
        "n": {"password": ""},
    }
    assert redacted_tree(tree) == kept


LONG = [
    "a",
    "A_",
    "x-",
    "-----BEGIN ",
    "eyJ",
    "://",
    "a://",
    "password ",
    "?a_",
    "Basic ",
    "sk-",
    "SG.",
    "-----BEGIN PRIVATE KEY-----",
]


@pytest.mark.parametrize("piece", LONG)
def test_the_time_for_a_long_line_grows_no_faster_than_the_line(piece: str) -> None:
    without_shapes(piece * (100_000 // len(piece)))  # with a pattern of quadratic time this takes minutes
