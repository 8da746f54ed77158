"""Small problems with exact answers: own families in English and Chinese, each with a worked chain and a verifier."""
