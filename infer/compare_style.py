"""How infer.compare's page looks: wide and narrow, light and dark."""

STYLE = """
:root {
  --back: #fbfbfa; --card: #ffffff; --text: #1c1d20; --quiet: #62656c; --line: #dddedf;
  --a: #1f6feb; --b: #c2570c; --mark: #ffe08a; --mark-text: #1c1d20;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #15171a; --card: #1d2024; --text: #e4e5e7; --quiet: #9a9ea6; --line: #373b41;
    --a: #6cb0ff; --b: #ffa057; --mark: #6d5200; --mark-text: #fff3cf;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.35rem; line-height: 1.6; overflow-wrap: anywhere; }
h1 span { display: inline-block; margin-right: .8em; }
h2 { font-size: 1.15rem; margin: 40px 0 8px; }
h3 { font-size: .95rem; margin: 0 0 8px; }
h3 span, .note, .tiles span { color: var(--quiet); font-weight: normal; font-size: .9rem; }
p { margin: 8px 0; }
b.a, b.b { display: inline-block; min-width: 1.5em; padding: 0 .4em; border-radius: 4px; text-align: center; line-height: 1.4; }
b.a { color: var(--back); background: var(--a); }
b.b { color: var(--back); background: var(--b); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tiles div, section, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.tiles strong { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); }
th { font-weight: normal; color: var(--quiet); }
.models { width: 100%; table-layout: fixed; }
.models th:first-child { width: 9.5em; }
.models td { overflow-wrap: anywhere; }
.differs td { font-weight: 600; }
.plots, .pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
figure { margin: 16px 0 0; padding: 12px; }
svg { display: block; width: 100%; height: auto; }
section { margin: 12px 0; overflow-wrap: anywhere; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 6px 0 10px; }
.prompt { color: var(--quiet); }
mark { background: var(--mark); color: var(--mark-text); border-radius: 3px; padding: 1px 2px; }
code { font: .9em ui-monospace, monospace; background: var(--line); border-radius: 3px; }
code { padding: 1px 3px; white-space: pre-wrap; }
@media (max-width: 720px) {
  main { padding: 12px 12px 48px; }
  .plots, .pair { grid-template-columns: minmax(0, 1fr); gap: 10px; }
  .models th:first-child { width: 6.2em; }
  th, td { padding-right: 8px; }
}
"""
