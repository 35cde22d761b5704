from fastkd.cli import info, main


def test_ctrl_c_gives_one_line_and_the_shells_status(monkeypatch, capsys):
    def stopped(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", stopped)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "fastkd info: stopped\n"
