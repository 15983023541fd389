"""The Docker engine, if one is running and testcontainers is installed."""

import sys


def has_image(image: str) -> bool:
    """Tell whether a Docker engine answers and has an image or can pull it."""
    try:
        from docker.errors import DockerException, ImageNotFound
        from testcontainers.core.config import testcontainers_config
        from testcontainers.core.docker_client import DockerClient
    except ImportError:
        return False
    try:
        client = DockerClient().client
        client.ping()
    except DockerException:
        return False  # no engine: the usual case, not worth a message
    # testcontainers also starts a container that removes the others.
    needed = [image] if testcontainers_config.ryuk_disabled else [image, testcontainers_config.ryuk_image]
    for each in needed:
        try:
            client.images.get(each)
        except ImageNotFound:
            print(f"Docker pulls {each}, which takes up to some minutes", file=sys.stderr)
            try:
                client.images.pull(each)
            except (DockerException, OSError):
                print(f"Docker cannot pull {each} (docker pull says why), so it is not used", file=sys.stderr)
                return False
    return True
