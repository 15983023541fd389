"""The Docker engine, if one is running and testcontainers is installed."""

import sys


def has_image(image: str) -> bool:
    """Tell whether a Docker engine answers and has an image or can pull it."""
    try:
        from docker.errors import DockerException, ImageNotFound
        from testcontainers.core.docker_client import DockerClient
    except ImportError:
        return False
    try:
        client = DockerClient().client
        client.ping()
    except DockerException:
        return False  # no engine: the usual case, not worth a message
    try:
        client.images.get(image)
    except ImageNotFound:
        try:
            client.images.pull(image)
        except (DockerException, OSError) as exc:
            print(f"Docker is running, but cannot pull {image}: {exc}", file=sys.stderr)
            return False
    return True
