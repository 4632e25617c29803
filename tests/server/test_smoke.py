from tests.server.conftest import *
async def test_x(daemon: Daemon) -> None:
    a, b = await daemon.arrive("a", "b")
    run = await daemon.submit(make_spec(rounds=4))
    for r in range(4):
        for k, s in enumerate((a, b)):
            t = await s.task()
            assert t.key.round == r + 1
            await s.fetch(t)
            assert not await s.submit(t, some_delta(42, k, r))
    v = await daemon.end(run.run)
    print(v)
    assert v.phase == "finished", v
