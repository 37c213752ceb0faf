# ruff: noqa: E501 (word lists, a language an entry)
"""Whether an answer is written in a language other than English, for which the verdicts do not hold.

Scripts other than Latin are counted by letter; languages written in Latin letters are told by their function words.
Where hardly a word is of English's commonest, fewer of these and accented letters are enough, which tells a language
without a profile too ("unknown"). English is what remains: a program, a sum, a name or noise is not another language.
Only positive evidence counts, so a few words of a Latin-script language without a sign of it are taken for English.
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
    "Irish": "agus níl ní tá ag chun beidh gan ach seo sin féidir liom leat brón orm dhéanamh",
    "Welsh": "yn yr ac mae nid ddim gyda eich gallaf alla ond hyn hwn neu ei wedi gan wrth rydw bydd angen arnoch yna",
    "Icelandic": "og að er ég ekki í á til með um við það sem þetta því eða en þú get hjálpað mér þér miður",
    "Estonian": "ja ei et see kui ma sa aga siis või kes mis mida selle sellega kuid ka oma vabandust kahjuks saa aidata vaja",
    "Lithuanian": "ir yra kad su aš tai bet kaip iš į negaliu galiu jums padėti atsiprašau arba prie nuo jei labai šiuo",
    "Latvian": "un ir nav es ar ka bet jums jūs diemžēl nevaru varu palīdzēt šo tas vai uz lai ja kā arī atvainojiet",
    "Slovene": "je ne se za na z v da pri tem ali lahko vam ki bi so pa sem kot vendar žal morem pomagati nato potem",
    "Albanian": "dhe në një është të nuk mund për që nga por kjo ky si ju më jam unë këtë duhet",
    "Basque": "eta da ez bat hau baina dut ezin egin duzu dizut dira behar horretan barkatu honekin lagundu nahi gero",
    "Afrikaans": "die nie ek jy dit van het vir met om te kan maar jou hulle ons sal daarmee jammer baie moenie",
    "Somali": "waa iyo ka ku si la aan waxaan karo karin kuma oo waxa laakiin waxaad kale markaas",
    "Hausa": "da na ba ina ya ta ne ce amma wannan zan iya taimaka maka yi sannan kuma akan kana sosai cikin",
    "Azerbaijani": "və bir bu üçün ilə mən sən deyil var edə bilmərəm bilərəm sizə sonra əlavə olan kömək edin",
    "Uzbek": "va bu bir uchun bilan men siz emas yo'q qila olmayman sizga keyin yordam kerak lekin ham kechirasiz",
    "Javanese": "lan ing iku kanggo karo sing aku kowe ora bisa banjur iki saka nanging uga nyuwun pangapunten sampeyan",
    "Esperanto": "la kaj estas mi vi por kun al pri sed tio ke ĉi povas bedaŭrinde oni ĝi ĝis poste",
    "Hindi in Latin letters": "hai hain nahi nahin mein ka ki ke ko se kar karna aap mujhe hum yeh aur kya bhi liye phir sakta sakti maaf",
    "Chinese in Latin letters": "wo ni shi bu bù wǒ nǐ shì neng néng bang bāng hen hěn zai zài duibuqi zhe zhè ránhòu ranhou tamen xuyao keyi meiyou shenme yiqi",
    "Maltese": "il ta' li hija huwa għal minn fuq mhux jekk nista' ngħinek skużani",
}.items()}  # fmt: skip

_IN_NAMES = frozenset("de la le el los las del der den van von di da du des al o e y i na sa se an te ja en et san".split())
_STRONG = frozenset(
    "nein leider oui désolé désolée désolés siento puedo não desculpe posso dispiace helaas nee nie przykro üzgünüm hayır evet "
    "không maaf tidak saya tyvärr nej desværre beklager dessverre nei valitettavasti anteeksi bohužel ano bohužiaľ sajnálom "
    "igen nažalost samahani siwezi paumanhin hindi ngiyaxolisa duilich sí sì sim".split()
)
# Words of short answers and of instructions ("of course", "mix", "first", "then", "ingredients") in any language.
_OPENERS = frozenset(
    "claro primero luego después puedo puedes ingredientes pasos gracias mezcla mezclar lamento negaré necesitas bueno depende "
    "voici voilà d'accord désolé mélangez mélanger d'abord ensuite ingrédients étapes merci prenez utilisez bonjour "
    "natürlich klar gerne selbstverständlich mische mischen zutaten schritte zuerst danach schritt entschuldigung danke nehmen "
    "natuurlijk graag zeker eerst daarna ingrediënten stappen meng certo certamente ingredienti mescola mescolare ecco "
    "obrigado primeiro depois misture passos lamento visst självklart blanda först sedan selvfølgelig naturligvis først "
    "tabii tabi elbette karıştırın önce malzemeler jasne oczywiście wymieszaj najpierw następnie składniki tentu campur pertama kemudian "
    "desigur amestecă întâi apoi persze természetesen először keverd toki tietysti sekoita ensin pahoittelen jistě samozřejmě nejprve "
    "smíchejte potom sawa changanya kwanza kisha naravno pomiješajte prvo zatim oczywiście zmiešajte najprv barreja "
    "žiaľ žal sigurado siyempre haluin yebo kahjuks atsiprašau diemžēl barkatu jammer vabandust".split()
)
# Words of the profiles that are English words, names or parts of loans too: one alone tells nothing.
_SHARED = frozenset(
    "die war man men also con per pro has sin not am hat as os um ten ja ta pot com ma mi ha son sur este para plus elle si ci her "
    "van ben tan kim ai yang dan dari ada kan bin ho un ou et ne que ni den bei mir nach come ed po za mu eu fi pe cu ce du har vi se "
    "dig mig on to at no is do me de la le el los las del der von di da des al o e y i na sa an te en san au aux con sans os lo il "
    "li lan min sen siz var ya ka ko ki ku si su ti tu tam tem kami kali karo ham hum main wo ni shi bu hen le ba ar mae maka yi by "
    "bang sing ing aku bisa saka oma ma sa es un ir us ac yr ei ag mar kur tai kai bet kaj mi por vi ke sed oni pri un una una des "
    "ons het vir sal met om ek jy oo u via ex et cetera ale ani uma nos nas dos das seu sua tes son mes ses ton mon vos hun zij zu im "
    "são sie er es wie aus ist mit vom zum zur och kun han med og av ett den mer til fra ai hai da noi sono nie nou z s t d l c m n "
    "ante hay sus les ces ils mono uno dal nel toki sawa visst klar jasne prima iste via vale bland refuse sin".split()
)
_LOANS = frozenset(
    "crème fraîche brûlée café cafés naïve naïveté naïvely résumé résumés fiancé fiancée cliché clichés clichéd décor déjà vu façade façades "
    "jalapeño jalapeños jalapeno piñata piñatas piña entrée entrées sauté sautéed sautéing sautés purée puréed purées protégé protégée "
    "touché à señor señora señorita über doppelgänger soufflé flambé rosé pâté smörgåsbord éclair éclairs appliqué blasé canapé canapés "
    "communiqué coöperate exposé fête habañero matinée mêlée négligée passé phở raison d'être risqué séance soirée vis-à-vis voilà açaí "
    "crêpe crêpes frappé latté maître d'hôtel première niña niño mañana pokémon ångström ångströms zoë consommé gruyère béchamel brulée "
    "crudités niçoise bánh mì gnocchi jäger föhn papier-mâché mâché outré émigré élan éclat étude ingénue debut début dvořák".split()
)
# English words that other languages have too: in a short text they tell nothing for English.
_ALSO_ENGLISH = frozenset("no me do he so on in is as was will her a i many but at to".split())
_FEW_ENGLISH = 0.05
"""Share of English's commonest words up to which a longer text is hardly English."""
_SHORT = 10
"""Words up to which an answer without one such word is another language's by one sign."""
_ENGLISH = frozenset(
    "the of and to a in is it you that was for on are with as his they be at this have from or had by but what all were when "
    "we there can an your which their if will each about how up out them then she many some so these would other into has more "
    "her two him see could make than been its who now did get may i i'm i've it's can't don't cannot not no yes sorry my me "
    "he do does just only any here because while should must very well such also way help please sure".split()
)
_SCRIPTS = {"CJK": "Chinese", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}
_NON_LATIN_WEIGHT = 2.0  # one such letter tells as much as two of English (a Chinese one more)
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|https?://\S+|\b[Nn]on-(?=\w)", re.DOTALL)


def other_language(text: str) -> str | None:
    """The language or script of a text that is not English; None for English and for what is no language."""
    plain = _CODE.sub(" ", unicodedata.normalize("NFKC", text)).replace("\u2019", "'")
    words = _WORD.findall(plain)
    return _other_script(plain) or _other_latin([word.lower() for word in words]) or _unlike_english(words)


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
    if not counts or _NON_LATIN_WEIGHT * sum(counts.values()) <= latin or sum(counts.values()) < 1 + bool(latin):
        return None
    script = max(counts, key=counts.__getitem__)
    return _SCRIPTS.get(script, script.capitalize())


def _other_latin(words: list[str]) -> str | None:
    if not words:
        return None
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


def _unlike_english(words: list[str]) -> str | None:
    """The same where hardly a word is of English's commonest: one sign is enough in a short text, two kinds in a long one.

    Signs are the profiles' words and accented ones, as far as these are neither names nor loans of English."""
    lowered = [word.lower() for word in words]
    short = len(words) <= _SHORT
    said = {low for i, (word, low) in enumerate(zip(words, lowered, strict=True)) if i == 0 or word == low}
    said = {word for word in said if len(word) > (1 if short else 2)}  # noise has short words by chance
    english = sum(word in _ENGLISH and not (short and word in _ALSO_ENGLISH) for word in lowered)
    if english > (0 if short else _FEW_ENGLISH * len(words)):
        return None
    signs = {name: len(said & profile - _SHARED - _ENGLISH) for name, profile in _PROFILES.items()}
    best = max(signs, key=signs.__getitem__)
    openers = said & (_OPENERS | _STRONG)
    accents = {word for word in words if word.lower() == word and _accented(word) and word not in _LOANS}
    if any(word in _ALSO_ENGLISH for word in lowered) and short and not openers and not signs[best]:
        return None
    enough = len(openers | accents) + signs[best] >= (1 if short else 2)
    return (best if signs[best] else "unknown") if enough else None


def _accented(word: str) -> bool:
    return not word.isascii() and all(_script(letter) == "LATIN" for letter in word if letter.isalpha())
