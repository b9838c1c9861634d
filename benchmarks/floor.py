"""A target that only answers: what the server costs without us."""

import flask
import functions_framework


@functions_framework.http
def handle_topup(_request: flask.Request) -> str:
    """Answer, and do nothing."""
    return ""
