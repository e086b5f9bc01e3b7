# SPDX-License-Identifier: Apache-2.0
"""Lines that tokenizers are trained and compared on: many scripts, code, numbers, spaces."""

from __future__ import annotations

import random
from functools import cache

_WORDS = {
    "latin": "the model reads a line and writes what follows it while another one listens token by "
    "token because nothing is lost when every byte has its place in both of them however strange "
    "street river mountain evening question answer teacher student distance measure window",
    "french": "où est-ce déjà l'été garçon naïve cœur fenêtre élève maître à côté façade Noël",
    "german": "Straße über Mädchen größer Fußgängerübergänge schön ÄPFEL ÖL Übung Käse weiß",
    "polish": "żółw łódź gęś źrebię świat ćma ręka miód ząb Łódź",
    "vietnamese": "tiếng Việt người đường trường những được không nước cộng hòa",
    "turkish": "ışık İstanbul güneş çocuk ağaç öğretmen IĞDIR dağ şeker",
    "cyrillic": "модель читает строку и пишет дальше Москва ёлка Київ їжак подъезд щука ЭХО",
    "greek": "το μοντέλο διαβάζει γραμμή Αθήνα ἄνθρωπος θάλασσα ῥόδον ψυχή ὦ",
    "hebrew": "שלום עולם מורה תלמיד שׁוּב ספר בית יום",
    "arabic": "مرحبا بالعالم كتاب مُعَلِّم طالب نهر لغة ﷺ سؤال",
    "persian": "می‌خواهم کتاب‌ها سلام دنیا پنجره چهار",
    "hindi": "नमस्ते दुनिया शिक्षक विद्यार्थी क्षेत्र हिन्दी प्रश्न ज्ञान",
    "bengali": "নমস্কার বিশ্ব শিক্ষক বাংলা ছাত্র প্রশ্ন",
    "tamil": "வணக்கம் உலகம் ஆசிரியர் மாணவர் தமிழ்",
    "thai": "สวัสดีชาวโลก ครู นักเรียน น้ำ ภาษาไทย กำลัง",
    "georgian": "გამარჯობა სამყარო მასწავლებელი მდინარე",
    "armenian": "բարեւ աշխարհ ուսուցիչ գետ հայերեն",
    "amharic": "ሰላም ዓለም መምህር ተማሪ",
    "khmer": "សួស្តី ពិភពលោក គ្រូ សិស្ស",
    "chinese": "你好 世界 老师 学生 模型 读 一行 字 然后 写 下一个 词 繁體字 學習 𠀀 𪜈 龘",
    "japanese": "こんにちは 世界 先生 がくせい モデル ﾊﾝｶｸ は 行を 読む 々 ヴ ゔ",
    "korean": "안녕하세요 세계 선생님 학생 모델 한국어 질문 뷁",
}
_EMOJI = "😀 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 🇯🇵 ❤️ ☕ 🧑🏿‍🚀 🤷🏻‍♀️ 1️⃣ 🫠 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ✊🏾 🐈‍⬛"
_MARKS = "\u0301\u0308\u0303\u0323\u0327\u030a\u0302\u0331\u20dd"
_SPACES = (" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", " \n", "    ", "        ")
_ODD = (
    "\u00a0 \u200b \u2009 \u202f \u3000 \ufeff \u00ad \u2060 \u200d \u200f \u202e \u2028 \u0085 "
    "\ufffd \x00 \x07 \x1b[0m \x7f ﬁ ﬀ ① ½ ㎏ Ｗｉｄｅ ™ … “ ” ‘ ’ – — × ≠ ∑ √ ∞ 𝒳 𝔄 Å Ω"
)
_CODE = (
    "def f(x, *, y=None):\n    return x ** 2 if y is None else y[::-1]",
    "for (size_t i = 0; i < n; ++i) { out[i] += 0x1F & ~mask; }",
    "SELECT \"id\", COUNT(*) FROM t WHERE name LIKE '%a_b%' GROUP BY 1;",
    '{"key": [1, 2.5e-3, null], "nested": {"tab": "\\t", "quote": "\\""}}',
    "<div class='a b'>&amp; &lt;p&gt;</div><!-- note -->",
    "if [ -f ~/.rc ]; then source ~/.rc && echo $? | sed -e 's/a/b/g'; fi",
    'fn main() -> Result<(), Box<dyn Error>> { let x: &\'static str = "é"; Ok(()) }',
    "\\begin{align} e^{i\\pi} + 1 &= 0 \\\\ \\end{align}",
    "- [ ] list\n\t* item **bold** _it_ `code` ~~no~~\n> quote",
    "<s>no token</s> <|im_end|> [UNK] <unk> <0x0A> ##ing Ġthe </w>",
    "don't you'll we've I'm they're it's o'clock DON'T",
    "C:\\dir\\file.txt /usr/lib/x.so.1 ../up ./here",
)


@cache
def lines(count: int = 10_000) -> tuple[str, ...]:
    """The first `count` of an endless list of different lines, the same each time.

    Some begin or end with spaces or line feeds. U+2581 is in none: where it stands for the space,
    a vocabulary without byte pieces cannot write it.
    """
    draw = random.Random(7)
    found: dict[str, None] = {}
    while len(found) < count:
        found.setdefault(_line(draw))
    return tuple(found)


def _line(draw: random.Random) -> str:
    parts = [_part(draw) for _ in range(draw.randint(1, 5))]
    text = parts[0] + "".join(
        (" " if draw.random() < 0.7 else draw.choice(_SPACES)) + part for part in parts[1:]
    )
    if draw.random() < 0.15:
        text = draw.choice(_SPACES) + text
    if draw.random() < 0.15:
        text += draw.choice(_SPACES)
    return text


def _part(draw: random.Random) -> str:
    kind = draw.random()
    if kind < 0.62:
        return _words(draw)
    if kind < 0.70:
        return "".join(draw.choices(_EMOJI.split(), k=draw.randint(1, 4)))
    if kind < 0.78:
        return _number(draw)
    if kind < 0.84:
        word = draw.choice(_WORDS["latin"].split())
        return "".join(c + "".join(draw.choices(_MARKS, k=draw.randint(0, 2))) for c in word)
    if kind < 0.92:
        return draw.choice(_CODE)
    if kind < 0.96:
        words = draw.choices(_WORDS["latin"].split(), k=3)
        return f"https://{words[0]}.example:8080/{words[1]}?q={words[2]}&n={draw.randrange(999)}%20"
    odd = draw.choices(_ODD.split(" "), k=3)
    return "".join(text + draw.choice(("", "a", "é", "字")) for text in odd)


def _words(draw: random.Random) -> str:
    language = draw.choice(tuple(_WORDS)) if draw.random() < 0.6 else "latin"
    words = draw.choices(_WORDS[language].split(), k=draw.randint(2, 9))
    joint = "" if language in ("chinese", "japanese", "thai", "khmer") else " "
    text = joint.join(words)
    if draw.random() < 0.3:
        text = text.capitalize()
    return text + draw.choice(("", ".", ",", "?", "!", ":", "。", "؟", "…", ";"))


def _number(draw: random.Random) -> str:
    value = draw.randrange(10 ** draw.randint(1, 12))
    return draw.choice((f"{value}", f"{value:,}", f"-{value / 7:.3f}", f"{value:#x}", f"{value}%"))
