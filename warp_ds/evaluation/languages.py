# ruff: noqa: E501 (word lists, a language an entry)
"""Whether an answer is written in a language other than English, for which the verdicts do not hold.

Scripts other than Latin are counted by letter; languages written in Latin letters are told by their function words.
English is what remains: a program, a sum, a name or noise is not another language. Only positive evidence counts, so a
Latin-script language without a profile here is taken for English (and mostly for noise, by its word order).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

# Function words that are no English words; particles that stand in names count half (see `_IN_NAMES`).
_PROFILES: Mapping[str, frozenset[str]] = {name: frozenset(words.split()) for name, words in {
    "German": "der das und ist nicht ich ein eine einen einem einer zu mit auf für von dem den des sich auch wie oder aber wenn "
              "kann können sie wir ihr ihnen dir mir bei nach aus um durch über sind werden wird hier leider nein ja tut "
              "keine kein diese dieser dieses dass daß zum zur vom im nur noch sehr mehr",
    "French": "le les des une est et je ne pas que qui dans pour avec sur vous nous il elle ils ce cette ces mais ou où "
              "du au aux sont être avoir peux peut puis désolé désolée oui votre vos notre mon ma mes son sa ses leur plus par comme "
              "voici cela ça suis ai c'est n'est d'un d'une l'on j'ai qu'il",
    "Spanish": "el los las una es y que en con por para no_ su sus se lo siento puedo puede del al como más pero este esta esto "
               "eso sí ser estar hay yo tú usted ustedes nosotros muy también donde cuando porque sobre son mi aquí ayudarte "
               "ayudar unos unas le les ni todo hasta tiene hacer",
    "Portuguese": "o os as um uma é e que em não com por para seu sua seus suas do da dos das no_ na nos nas ao à como mais mas "
                  "este esta isso isto ser estar há eu você vocês nós muito também onde quando porque sobre são meu minha "
                  "desculpe posso pode sim aqui se",
    "Italian": "il lo gli le una uno è che non con per di del della dei delle nel nella al alla ai sono essere avere ho hai "
               "mi ti si ci vi ma se come più questo questa questi quello anche dove quando perché posso può mio tuo suo "
               "dispiace ecco io noi sì e ed",
    "Dutch": "het een en van ik niet dat die met voor zijn op te aan er maar om ook als dan bij nog wel uit naar je jij jouw u "
             "wij we_ ze zij hun kan kunnen moet worden wordt deze dit geen hoe wat_ waar sorry_ helaas nee ja",
    "Polish": "i w nie na się z do jest to_ że jak o dla ale ja ty on_ ona są być mogę może można przez po za od czy który która "
              "które tego tym ten ta te jego jej ich oraz przykro mi proszę tak lub",
    "Turkish": "ve bir bu için ile ben sen biz siz onlar değil var yok ne nasıl daha çok gibi ama veya olarak olan üzgünüm evet "
               "hayır edemem bunu size sana her kadar sonra ki de da mi mı",
    "Vietnamese": "là và của không có tôi bạn cho một được trong với này các những để khi người đã sẽ như rất xin lỗi thể về "
                  "từ đến hoặc nhưng",
    "Indonesian": "yang dan di untuk dengan tidak ini itu dari saya anda kami kita mereka adalah pada akan bisa dapat maaf atau "
                  "juga oleh karena seperti tetapi ke sebagai dalam bukan ada sudah ya",
    "Swedish": "och att det är jag inte en ett som på för med av till den de_ du kan om så men har hur eller vi ni från när ska "
               "tyvärr ja nej mig dig detta denna",
    "Danish": "og at_ det er jeg ikke en et som på for_ med af til den de_ du kan om så men_ har hvordan eller vi fra når skal "
              "desværre ja nej mig dig dette beklager",
    "Norwegian": "og å det er jeg ikke en et som på med av til den du kan om så har hvordan eller vi fra når skal dessverre ja "
                 "nei meg deg dette beklager",
    "Finnish": "ja on_ ei se että en_ minä sinä hän me_ te he_ voi olla mutta tai kun jos myös ovat tämä kuin ole mitä miten kyllä "
               "anteeksi valitettavasti voin",
    "Czech": "a_ je na se to_ že v ne s z do jak pro ale já ty jsou být mohu může který která které nebo tak jsem bohužel ano "
             "omlouvám tento této při od po",
    "Slovak": "je na sa to_ že v nie s z do ako pre ale ja ty sú byť môžem môže ktorý ktorá ktoré alebo tak som bohužiaľ áno",
    "Romanian": "și şi este nu de la în un o pe cu din pentru că să ce mai dar sunt fi eu tu el ea noi voi acest această sau cum "
                "îmi pare rău pot poate da",
    "Hungarian": "és az nem hogy egy van de ez is_ meg én te ő mi ti ők vagy lehet mint csak ha már sajnálom igen kell nagyon "
                 "sajnos tudok",
    "Croatian": "je na se da u ne i_ s za od ali ja ti su biti mogu može koji koja koje ili kako sam nažalost žao ovo to_",
    "Catalan": "el els les una és i_ que en amb per no_ del al com més però aquest aquesta això ser ho sento puc pot sí jo",
    "Swahili": "na ya wa kwa ni katika hii hiyo siwezi sina samahani kuwa kama au lakini cha za la wewe mimi yako",
    "Tagalog": "ang ng mga sa na ay hindi ako ka ko mo siya ito iyan kung para po paumanhin maaari ngunit at_ o_",
    "Zulu": "ukuthi futhi kodwa noma uma angikwazi ngiyaxolisa lokhu ukuze kanye yini wena mina yakho kakhulu",
    "Gaelic": "agus tha airson chan eil urrainn mi duilich gu bheil seo sin ann an_ air bho",
}.items()}  # fmt: skip

_IN_NAMES = frozenset("de la le el los las del der den van von di da du des al o e y i na sa se an te ja en et san".split())
_STRONG = frozenset(
    "nein leider oui désolé désolée désolés siento puedo não desculpe posso dispiace helaas nee nie przykro üzgünüm hayır evet "
    "không maaf tidak saya tyvärr nej desværre beklager dessverre nei valitettavasti anteeksi bohužel ano bohužiaľ sajnálom "
    "igen nažalost samahani siwezi paumanhin hindi ngiyaxolisa duilich sí sì sim".split()
)
_ENGLISH = frozenset(
    "the of and to a in is it you that was for on are with as his they be at this have from or had by but what all were when "
    "we there can an your which their if will each about how up out them then she many some so these would other into has more "
    "her two him see could make than been its who now did get may i i'm i've it's can't don't cannot not no yes sorry my me "
    "he do does just only any here because while should must very well such also way help please sure".split()
)
_SCRIPTS = {"CJK": "Chinese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}
_NON_LATIN_WEIGHT = 2.0  # one such letter tells as much as two of English (a Chinese one more)
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|https?://\S+", re.DOTALL)


def other_language(text: str) -> str | None:
    """The language or script of a text that is not English; None for English and for what is no language."""
    plain = _CODE.sub(" ", unicodedata.normalize("NFKC", text)).replace("\u2019", "'")
    return _other_script(plain) or _other_latin(_WORD.findall(plain.lower()))


def _script(letter: str) -> str:
    """The first word of a letter's name: LATIN, CYRILLIC, CJK, HIRAGANA, ..."""
    return unicodedata.name(letter, "UNKNOWN").split(" ")[0].split("-")[0]


def _other_script(text: str) -> str | None:
    latin = sum("a" <= letter <= "z" or "A" <= letter <= "Z" or "\u00c0" <= letter <= "\u024f" for letter in text)
    others = [letter for letter in text if letter > "\u024f" and letter.isalpha()]
    counts: dict[str, int] = {}
    for letter in others:
        counts[_script(letter)] = counts.get(_script(letter), 0) + 1
    counts.pop("LATIN", None)
    if counts.get("GREEK", 0) < 8:
        counts.pop("GREEK", None)  # a formula's letters
    if not counts or _NON_LATIN_WEIGHT * sum(counts.values()) <= latin or sum(counts.values()) < 2:
        return None
    script = max(counts, key=counts.__getitem__)
    return _SCRIPTS.get(script, script.capitalize())


def _other_latin(words: list[str]) -> str | None:
    if not words:
        return None
    if len(words) <= 3:
        return next((name for name, profile in _PROFILES.items() if any(word in _STRONG & profile for word in words)), None) if (
            not any(word in _ENGLISH for word in words)) else None
    english = sum(word in _ENGLISH for word in words)
    accents = sum(not word.isascii() for word in words)
    best, most, kinds = "", 0.0, 0
    for name, profile in _PROFILES.items():
        hits = [word for word in words if word in profile and word not in _ENGLISH]
        score = sum(0.5 if word in _IN_NAMES else 1.0 for word in hits)
        if score > most:
            best, most, kinds = name, score, len(set(hits))
    score = most + 0.5 * min(accents, most)
    enough = score >= max(2.0, 0.15 * len(words)) and kinds >= (2 if len(words) < 9 else 3)
    return best if enough and score > 1.2 * english else None
