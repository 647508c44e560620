"""Whether the model hub can be reached, found out once and within seconds; its library tries for most of a minute.

Without a network, whatever downloads through huggingface_hub then fails at once on what is not in the cache.
"""

import functools
import os
import sys
import threading

from huggingface_hub import constants
from huggingface_hub.utils import get_session


def unreachable(url, seconds=5):
    """Why nothing can be fetched from this address, as text; empty where its server answers within so many seconds."""
    if constants.HF_HUB_OFFLINE:
        return "offline mode is on"
    answered = []

    def ask():
        try:
            # The hub's own client: what it reaches with its proxies and certificates, downloads will reach as well.
            status = get_session().head(url, timeout=seconds).status_code
            answered.append(status not in (500, 502, 503, 504))  # those that the library would try again
        except Exception:  # each HTTP library has its own kinds
            pass

    # Looking up a host name knows no time limit, so it is left behind in a thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return "" if answered == [True] else f"{url} cannot be reached"


@functools.cache
def go_offline_if_unreachable():
    """Puts the hub's libraries into offline mode for this process if the hub does not answer. Asks it only once.

    Returns the reason as text, empty where downloads can be tried. HF_HUB_OFFLINE in the environment decides instead:
    1 is offline mode, 0 insists on the network.
    """
    if "HF_HUB_OFFLINE" in os.environ and not constants.HF_HUB_OFFLINE:
        return ""
    reason = unreachable(constants.ENDPOINT)
    if reason:
        constants.HF_HUB_OFFLINE = True  # timm, transformers and diffusers go by it
        if "datasets.config" in sys.modules:  # has copied it, if imported before
            sys.modules["datasets.config"].HF_HUB_OFFLINE = True
    return reason
