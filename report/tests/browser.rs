//! The pages in a real browser, where there is one: no console message, no request, nothing wider than the screen, and a PDF.
//!
//! A page forbids scripts, so it is looked at from outside: it stands in frames of a page of the test, which measures.

#![allow(clippy::print_stderr, reason = "says that a check was skipped")]

mod records;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lowbit_report::html;
use records::{all, several};
use serde_json::Value;

/// `LOWBIT_CHROMIUM`, or the first that is in the path.
fn browser() -> Option<PathBuf> {
    let named = std::env::var_os("LOWBIT_CHROMIUM").map(PathBuf::from);
    let folders: Vec<PathBuf> =
        std::env::var_os("PATH").map(|p| std::env::split_paths(&p).collect()).unwrap_or_default();
    let usual = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell"];
    let found = usual.iter().flat_map(|name| folders.iter().map(move |f| f.join(name)));
    named.into_iter().chain(found).find(|p| p.is_file())
}

/// What a run of the browser left.
struct Seen {
    /// The document after its scripts ran.
    document: String,
    /// Lines of the console.
    console: Vec<String>,
    /// What pages asked the network for.
    requests: Vec<String>,
}

/// Opens `page`; nothing outside this machine can be reached. `None` where the browser does not start at all.
fn open(browser: &Path, dir: &Path, page: &Path, more: &[String]) -> Option<Seen> {
    let (log, out, err) = (dir.join("net.json"), dir.join("out"), dir.join("err"));
    let mut child = Command::new(browser)
        .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"])
        .args(["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"])
        .args(["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--enable-logging=stderr", "--v=0"])
        .args(["--virtual-time-budget=5000", "--window-size=1300,900"])
        .arg(format!("--user-data-dir={}", dir.join("profile").display()))
        .arg(format!("--log-net-log={}", log.display()))
        .args(more)
        .arg(format!("file://{}", page.display()))
        .stdin(Stdio::null())
        .stdout(fs::File::create(&out).unwrap())
        .stderr(fs::File::create(&err).unwrap())
        .spawn()
        .ok()?;
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > Duration::from_secs(180) {
            child.kill().unwrap();
            child.wait().unwrap();
            return None;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let text = |p: &Path| String::from_utf8_lossy(&fs::read(p).unwrap_or_default()).into_owned();
    if !status.success() {
        eprintln!("{}", text(&err));
        return None;
    }
    let lines = |t: String, f: &dyn Fn(&str) -> bool| t.lines().filter(|l| f(l)).map(str::to_owned).collect();
    Some(Seen {
        document: text(&out),
        console: lines(text(&err), &|l| l.contains(":CONSOLE")),
        // The browser's own requests come from no page.
        requests: lines(text(&log), &|l| {
            l.contains("\"initiator\":")
                && !l.contains("\"initiator\":\"not an origin\"")
                && l.contains("\"url\":\"http")
        }),
    })
}

/// A page with each of `pages` in a frame of each width, and what it measures of them in its title.
fn frames(pages: &[&str], widths: &[u32]) -> String {
    let mut out = String::from("<!doctype html><meta charset=utf-8><title></title>");
    for page in pages {
        let page = page.replace('&', "&amp;").replace('"', "&quot;");
        for width in widths {
            out += &format!("<iframe style=\"border:0;width:{width}px;height:900px\" srcdoc=\"{page}\"></iframe>");
        }
    }
    out + "<script>onload = () => { document.title = JSON.stringify([...document.querySelectorAll('iframe')].map(f => {
        const d = f.contentDocument, box = e => e.getBoundingClientRect(), all = s => [...d.querySelectorAll(s)];
        const open = e => !e.closest('.scroll') && !e.closest('.skip') && !e.closest('caption') && !e.closest('details:not([open])');
        const dark = matchMedia('(prefers-color-scheme: dark)').matches;
        return {
            width: f.clientWidth,
            scroll: d.documentElement.scrollWidth,
            outside: all('main *, header *, footer *').filter(e => open(e) && (box(e).right > f.clientWidth + 1 || box(e).left < -1))
                .map(e => e.tagName + ' ' + e.textContent.slice(0, 40)),
            verdict: all('.verdict').map(e => box(e).top)[0],
            page: d.defaultView.getComputedStyle(d.body).backgroundColor,
            unnamed: all('[tabindex], svg[role=img], nav').filter(e =>
                !e.getAttribute('aria-label') && !e.querySelector(':scope > title')).length,
            overflown: all('svg text').filter(t => {
                const s = t.ownerSVGElement.viewBox.baseVal, b = t.getBBox();
                return !t.hasAttribute('transform') && (b.x < -2 || b.x + b.width > s.width + 2 || b.y + b.height > s.height + 2);
            }).map(t => t.textContent),
            dark,
        };
    })); }</script>"
}

fn measured(document: &str) -> Vec<Value> {
    let title = document.split("<title>").nth(1).and_then(|t| t.split("</title>").next()).unwrap_or_default();
    let text = title.replace("&quot;", "\"").replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {title:?}"))
}

#[test]
fn pages_hold_in_a_browser() {
    let Some(browser) = browser() else {
        eprintln!("skipped: no Chromium (LOWBIT_CHROMIUM)");
        return;
    };
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let file = |name: &str, text: &str| {
        let path = dir.join(name);
        fs::write(&path, text).unwrap();
        path
    };
    let (one, many) = (html(&[all().into()]).unwrap(), html(&several()).unwrap());
    let widths = [360, 390, 768, 1280];
    let page = file("frames.html", &frames(&[&one, &many], &widths));
    let dump = ["--dump-dom".to_owned()];
    let Some(light) = open(&browser, dir, &page, &dump) else {
        eprintln!("skipped: {} does not run here", browser.display());
        return;
    };
    assert!(light.console.is_empty(), "{:#?}", light.console);
    assert!(light.requests.is_empty(), "{:#?}", light.requests);
    let check = |found: &[Value], dark: bool| {
        assert_eq!(found.len(), 2 * widths.len());
        for f in found {
            assert_eq!(f["scroll"], f["width"], "{f:#}");
            assert_eq!((f["outside"].as_array().map(Vec::len), &f["unnamed"]), (Some(0), &0.into()), "{f:#}");
            assert_eq!((f["overflown"].as_array().map(Vec::len), &f["dark"]), (Some(0), &dark.into()), "{f:#}");
            // The verdict is on the first screen.
            assert!(f["verdict"].as_f64().is_some_and(|y| y < 700.0), "{f:#}");
        }
    };
    let found = measured(&light.document);
    check(&found, false);
    let dark =
        open(&browser, dir, &page, &[dump[0].clone(), "--blink-settings=preferredColorScheme=0".into()]).unwrap();
    let other = measured(&dark.document);
    check(&other, true);
    assert_ne!(found[0]["page"], other[0]["page"], "both themes have one background");

    // The check can fail: a page that fetches, logs and is too wide.
    let policy = one.find("<meta http-equiv").unwrap();
    let end = policy + one[policy..].find('>').unwrap() + 1;
    let image = "<img src=\"http://127.0.0.1:9/x.png\"><script>console.error('planted')</script>";
    let broken = format!("{}{}", &one[..policy], &one[end..])
        .replace("<main id=\"main\">", &format!("<main id=\"main\">{image}<p style=\"width:2000px\">wide</p>"));
    let bad = open(&browser, dir, &file("bad.html", &frames(&[&broken], &[390])), &dump).unwrap();
    assert!(bad.console.iter().any(|l| l.contains("planted")), "{:?}", bad.console);
    assert!(bad.requests.iter().any(|l| l.contains("x.png")), "{:?}", bad.requests);
    let f = &measured(&bad.document)[0];
    assert!(f["scroll"].as_u64() > Some(390) && f["outside"].as_array().is_some_and(|o| !o.is_empty()), "{f:#}");

    let pdf = dir.join("page.pdf");
    let print = ["--no-pdf-header-footer".to_owned(), format!("--print-to-pdf={}", pdf.display())];
    open(&browser, dir, &file("one.html", &one), &print).unwrap();
    let pdf = fs::read(pdf).unwrap();
    assert!(pdf.starts_with(b"%PDF-") && pdf.len() > 20_000, "{} bytes", pdf.len());
}
