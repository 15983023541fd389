"""How long a search of many pages may take."""

import time

import pytest

from worker.onenet.search_time import SearchTime


def test_each_page_has_the_time_of_a_request_but_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    search = SearchTime(13, None, 0)
    deadlines = []
    while now[0] < search.deadline:
        now[0] += 10
        search.renew(13)
        deadlines.append(search.deadline)
    assert deadlines[:3] == [23, 33, 43]
    assert deadlines[-1] == 613
