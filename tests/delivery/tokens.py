"""Signs a token with each algorithm by Authlib, and writes the public keys as a JWK set.

Arguments: a folder with rsa.pem, p256.pem, p384.pem, ed25519.pem and secret, and the `exp` of the
tokens. Prints a JSON object: algorithm -> token. Each token names its key by `kid`.
"""

import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")  # Authlib announces that this module moves to another package.
from authlib.jose import JsonWebKey, JsonWebToken  # noqa: E402

folder, expires = Path(sys.argv[1]), int(sys.argv[2])
keys = {
    name: JsonWebKey.import_key((folder / f"{name}.pem").read_bytes(), {"kid": name, "use": "sig"})
    for name in ("rsa", "p256", "p384", "ed25519")
}
secret = JsonWebKey.import_key((folder / "secret").read_bytes(), {"kty": "oct", "kid": "secret"})
of = {"RS": "rsa", "PS": "rsa", "ES256": "p256", "ES384": "p384", "Ed": "ed25519"}


def key(algorithm):
    if algorithm.startswith("HS"):
        return "secret", secret
    name = of.get(algorithm) or of[algorithm[:2]]
    return name, keys[name]


tokens = {}
for algorithm in sys.argv[3:]:
    name, private = key(algorithm)
    claims = {"sub": f"authlib-{algorithm}", "exp": expires}
    header = {"alg": algorithm, "kid": name}
    tokens[algorithm] = JsonWebToken([algorithm]).encode(header, claims, private).decode()
public = [json.loads(key.as_json(is_private=False)) for key in keys.values()]
shared = json.loads(secret.as_json(is_private=True))
(folder / "jwks.json").write_text(json.dumps({"keys": [*public, shared]}))
print(json.dumps(tokens))
