"""Whether the Hugging Face hub can be reached: asked once and quickly, since its clients retry for half a minute."""

from functools import cache

PROBE_SECONDS = 5.0


@cache
def why_unreachable() -> str | None:
    """None when the hub (or the mirror in HF_ENDPOINT) answers anything at all within `PROBE_SECONDS`."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    endpoint = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.get_session().head(endpoint, timeout=PROBE_SECONDS)
    except Exception as error:  # whatever the http library in use raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"{endpoint} does not answer ({reason})"
    return None
