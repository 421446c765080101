"""The words behind `refusal`, by what they mean and in what language. Data only; single words, nothing graphic.

Words are written as people write them; the reader lower-cases them and removes accents, as it does with the text. A
trailing * stands for any ending.
"""

# --- refused everywhere, because they are sexual and of minors by themselves ------------------------------------------

ALWAYS = """
loli lolis lolicon* lollicon* shota shotas shotacon* toddlercon* csam csem jailbait* nymphet nymphets nymphette
nymphettes pedo pedos paedo paedos pedophil* paedophil* childporn* kiddieporn* kidporn* kinderporn* lolikon
"""

# --- refused as a target, and in a sexual context ---------------------------------------------------------------------

MINOR = """
child children childrens children's stepchild stepchildren grandchild grandchildren godchild godchildren
schoolchild schoolchildren
kid kids kidz kiddo kiddos kiddy kiddie kiddies kidlet kidlets
girl girls girlz gurl gurls gurlz grl grls grrl grrls grrrl schoolgirl schoolgirls
boy boys boyz schoolboy schoolboys choirboy choirboys
teen teens teenage teenaged teenager teenagers teener teeners teenybopper tween tweens tweenie tweenies tweenager
preteen preteens preteenie preteenies
preteenage adolescent adolescents adolescence juvenile juveniles pubescent pubescents prepubescent prepubescents
toddler toddlers todler todlers baby babies babys infant infants newborn newborns neonate neonates youngster
youngsters youngling younglings bairn bairns rugrat rugrats
minor minors underage underaged underaging lolita lolitas
schooler schoolers preschooler preschoolers kindergarten kindergartner kindergartners kindergartener kindergarteners
schoolkid schoolkids chld chldren childern chlid
niñita niñito niñitas niñitos muchacha muchachas muchacho muchachos chiquilla chiquillas chiquillo adolescente
adolescentes
colegiala colegialas escolares menores quinceañera
fille filles fillette fillettes garçon garçons garçonnet enfant enfants adolescente écolière écolier lycéenne lycéennes
collégienne collégiennes mineure mineures mioche
mädchen madchen maedchen schulmädchen kleinkind kleinkinder säugling baby junge jungen jugendliche jugendlicher
jugendlichen minderjährig* teenie teenies backfisch schülerin schülerinnen
bambina bambino bambini bambine ragazzina ragazzine ragazzino ragazzini ragazza ragazze ragazzo ragazzi minorenne
minorenni bimba bimbe
menina meninas menino meninos criança crianças garoto garotos garotinha garotinho novinha novinhas
meisje meisjes jongen jongens jongetje jongetjes tiener tieners minderjarig* peuter kleuter kinderen kindern
dziewczynk* dziewczyn* chłopiec chłopca chłopcy chłopak chłopczyk* dziecko dzieci dziecka dziecięc* nastolat*
nieletni* niemowl*
flicka flickor flickan pojke pojkar pojken jente jenter jenta drenge dreng piger pige tonåring* mindreårig* tyttö tytöt
tyttönen poika pojat lapsi lapset alaikäi* dívka dívky holka holky holčička chlapec dítě nezletil* kislány gyerek
gyermek kiskorú
fetiță băiat băieți copil minoră
devochka devochki malchik malchiki rebenok shkolnitsa maloletka podrostok
çocuk* kız kızlar kızı oğlan bebek ergen liseli
anak anaknya gadis bocah bocil remaja bayi budak onnanoko otokonoko youjo joshikousei kodomo ladki ladka bachcha bachchi
bacchi
nabalig kishori mtoto watoto msichana mvulana
девоч* мальчик* мальчиш* мальчуг* ребен* ребят* дети детей детск* детиш* подрост* несовершеннолетн* малыш* малышк*
школьни*
младен* пацан* малолет* тинейдж*
дівчин* дівчат* хлопч* хлопець хлопц* дитин* діти дітей підліт* неповнолітн* немовл* школяр*
κοριτσ* αγορ* παιδι* εφηβ* ανηλικ* μωρο
בת ילדה ילד ילדים ילדות נערה נער תינוק קטינה קטין
بنت بنات البنت فتاة الفتاة ولد أولاد طفل* الطفل* أطفال الأطفال صبي صبية قاصر قاصرة قاصرات مراهق مراهقة مراهقين
مراهقات رضيع تلميذة دختر دختربچه پسربچه کودک بچه نوجوان لڑکی لڑکا
लड़की लड़का लड़के लड़कियां लड़कियाँ बच्चा बच्ची बच्चे बच्चों बच्चियां बालक बालिका किशोर किशोरी नाबालिग शिशु মেয়ে
ছেলে শিশু
"""

# found anywhere in a text, since these languages put no spaces between words
MINOR_INSIDE = """
少女 少年 子供 子ども こども 女の子 男の子 女児 男児 幼女 幼児 赤ちゃん 赤ん坊 中学生 小学生 高校生 女子高生
女子中学生 未成年 児童ポルノ 童女 未满十八 未滿十八 園児 幼い キッズ ティーン 女孩 男孩 孩子 小孩 儿童 兒童
幼童 婴儿 嬰兒 青少年 学生妹 學生妹 初中生 高中生 女童 男童 宝宝 寶寶 未成年 소녀 소년 어린이 아동 여자아이
남자아이 여고생 여중생 초등학생 중학생 고등학생 미성년 아기 유아 청소년 꼬마 남학생 여학생 초딩 중딩 고딩 เด็ก
"""
ALWAYS_INSIDE = "ショタ 萝莉 蘿莉"
ALWAYS_PHRASES = (r"(?:child|kiddie|kid|toddler|infant|preteen|underage) porn\w*", r"(?<!カ)ロリ(?!ー)")

# phrases in Latin letters, each a regular expression over single words with one space between
MINOR_PHRASES = (
    r"under ?age[d]?",
    r"under the age",
    r"barely (?:legal|18|eighteen)",
    r"age (?:regression|play)",
    r"jail bait",
    r"(?:high|middle|grade|grammar|primary|elementary|pre|nursery) ?schoolers?",
    r"school (?:kids?|aged?|uniforms?|pupils?|child\w*)",
    r"sweet sixteen",
    r"pre (?:pubescents?|teens?|schoolers?)",
    r"teeny boppers?",
    r"menor(?:es)? de edad",
    r"(?:ein|das|dem|des|kleines|nacktes|nackte|junges|het|een|klein|naakt) kinde?r?",
    r"(?:die|der|den|viele|kleine|nackte) kinder|kind(?:er)? nackt",
    r"nak(?:en|na|ne) barn|barn nak\w+",
    r"(?:be|chau|em|co|cau) (?:gai|trai|be)|tre (?:em|con)|con (?:gai|trai)",
    r"thieu (?:nien|nu)|vi thanh nien|hoc sinh|em be",
    r"batang (?:babae|lalaki)",
    r"아이(?:들|가|는|를|의|와)?",
)
ACCENTED = r"\b(?:niñ[oa]s?|bébés?)\b"  # without its accent the word is also a name

CHILD_SIGNS = "\N{BABY}\N{CHILD}\N{BOY}\N{GIRL}\N{BABY ANGEL}\N{CHILDREN CROSSING}"

# --- refused in a sexual context only ---------------------------------------------------------------------------------

YOUNG = """
young younger youngest youngish youth youths youthful daughter daughters stepdaughter stepdaughters son sons stepson
stepsons lad lads lass lasses lassie student students pupil pupils schoolyard cp girlish boyish catgirl catgirls
femboy femboys childlike childhood
childish childs teeny teenie diaper diapers nappies kinder ageplay ddlg boi bois jk freshman shoujo shojo shonen shounen
bebe bebes chica chicas chico chicos joven jovenes jeune jeunes gamine gosse gosses mineur mineurs
junge junger junges jong jonge giovane giovani bimbo moca garota garotas mloda mlody genc kucuk muda fata bata fiu lany
девушк* юн* молод* дівка молодий молода
शाला
"""
YOUNG_INSIDE = "若い 女生 幼 女学生 女子学生 学生 學生 妹妹 アイドル 童"
YOUNG_PHRASES = (
    r"(?:junior|senior) high(?: school)?|high school",
    r"(?:middle|primary|elementary|grade) school",
    r"little ones?",
    r"(?:la|una|las|unas|mi|esta|pequena) ninas?|ninas? (?:desnud\w+|pequenas?|bonitas?|sexy)",
    r"(?:el|un|los|unos|mi|este|pequeno) ninos?|ninos? desnud\w+",
    r"petite filles?",
    r"\d+ ?(?:st|nd|rd|th) grade",
)

# --- what makes a context sexual --------------------------------------------------------------------------------------

SEXUAL = """
nude nudes nudity nudist nudists nudism nudie naked nakedness nsfw sex sexual* sexy sexi sexier sexiest sexting erotic*
porn* pornographic topless bottomless undress* unclothed unclad disrob* lingerie underwear undies panties panty bra
bikini thong breast breasts boob boobs boobies tits titties cleavage nipple nipples genital genitals genitalia penis
vagina vulva pussy buttocks butt butts hentai ecchi ahegao xxx fetish* bdsm bondage masturbat* orgasm* orgy intercourse
fellatio blowjob handjob cumshot seductive* seduc* sensual* provocative* aroused arousal aphrodisiac horny lust lustful
lewd slut sluts slutty whore whores prostitut* stripper strippers striptease busty rape raped raping rapist molest*
incest voyeur* upskirt boudoir centerfold pinup gravure onlyfans
desnud* desnuda desnudo sexo erótic* nua nuas nue nues nuda nudo nudi pelada pelado dénud* nackt* entblößt* naakt* nag
naga nagi nagie nago goły goła gołe naken nakna nøgen alaston meztelen* nahá nahý nahé çıplak* seks telanjang bugil
голая голый голые голое голой голого голую голеньк* нагая нагой обнажен* секс* порно* эрот* оголен* голий гола
γυμν* ערום עירום
عاري عارية عراة عري جنس جنسي جنسية إباحي إباحية برهنه
नग्न नंगी नंगा नंगे सेक्स
"""
SEXUAL_INSIDE = "裸 ヌード エロ エッチ セックス 色情 性感 性爱 性愛 情色 알몸 누드 나체 벗은 섹스 야한 เปลือย"
SEXUAL_PHRASES = (
    r"pin up",
    r"skinny dipping",
    r"full frontal",
    r"(?:no|without(?: any)?|wearing no) (?:clothes|clothing)",
    r"wearing nothing",
    r"birthday suit",
    r"g string",
    r"blow job",
    r"r 18",
    r"(?:bare|exposed) (?:breast\w*|chest\w*)",
    r"khoa than|khieu dam|tinh duc",
    r"(?:garcon|fille|enfant|homme|femme|bebe)s? nue?s?",
)

# --- harmless: removed before the words above are looked for ----------------------------------------------------------

_ANIMALS = """
elephants? pandas? goats? deer fox(?:es)? bears? seals? penguins? owls? turtles? tortoises? monkeys? gorillas? chimp\\w*
orangutans? giraffes? hippos? rhinos? lions? tigers? cheetahs? leopards? wol(?:f|ves) dogs? cats? rabbits? bunn(?:y|ies)
ducks? ducklings? chicks? birds? eagles? hawks? salmon trout fish sharks? whales? dolphins? otters? hedgehogs?
squirrels?
raccoons? koalas? kangaroos? sloths? cal(?:f|ves) foals? lambs? pigs? piglets? cows? horses? pon(?:y|ies) donkeys?
crocodiles? alligators? dragons? dinosaurs? octopus(?:es)? axolotls? bats? mouse mice kittens? pupp(?:y|ies) llamas?
alpacas? camels? zebras? crabs? frogs? lizards? snakes? sheep swans? mammoths? robins? pigeons? gulls? falcons?
"""
ANIMALS = "|".join(_ANIMALS.split())
AGED_THINGS = "|".join(
    """
whisk(?:e)?ys? scotch(?:es)? bourbons? rums? wines? cheeses? brand(?:y|ies) cognacs? single malt port tequila
balsamic oaks?
trees? bonsais? olive pine yew car cars truck trucks laptops? computers? phones? house houses building buildings bridge
church bread beard newspapers? pizza coffee
""".split()
)

THINGS = (
    r"kid (?:leather|skin|suede|gloves?)",
    r"goat kids?|kid goats?",
    r"baby (?:oil|powder|lotion|shampoo|wipes?|s breath|blues?|pink|grand|carrots?|corn|spinach|bok choy|"
    r"(?:bell )?peppers?|potato(?:es)?|"
    r"kale|strollers?|carriages?|bugg(?:y|ies)|prams?|bottles?|monitors?|shoes?|cribs?|food|formula|showers?|bump|tooth|teeth|lettuce|leaf|gap|"
    r"boomers?|gates?|slings?|carriers?)",
    r"bab(?:y|ies) s (?:breath|crib|bottle|rattle)",
    r"child (?:seats?|locks?|safety (?:lock|seat)|s pose|proof)",
    r"child(?:ren)? s (?:books?|hospitals?|literature|museums?|menu|playgrounds?|bicycles?|shoes?|toys?|furniture)",
    r"infant (?:mortality|formula|car seats?|carriers?)",
    r"(?:binary )?(?:tree )?child (?:process(?:es)?|nodes?|class(?:es)?|elements?|benefit|support|care)",
    r"parent child|inner child",
    r"kid friendly|kiddie (?:pools?|rides?)|low boy trailers?|schoolboy caps?|newsboy caps?",
    r"shota (?:rustaveli|imanaga|arveladze)",
    r"toddler (?:beds?|car seats?|shoes?)",
    r"kids? (?:menus?|meals?|bikes?|shoes|toys|rooms?)",
    r"girl scout cookies?",
    r"game ?boys?(?: (?:color|advance))?",
    r"(?:boy|girl)s? scouts? (?:logo|badge|emblem)",
    r"[b-h] minor|[a-h] (?:sharp|flat) minor|key of a minor",
    r"minor (?:keys?|chords?|scales?|thirds?|seconds?|sixths?|sevenths?|planets?|leagues?|arcana|surgery|details?|"
    r"falls?|roads?|characters?|injur(?:y|ies)|"
    r"damage|bugs?|updates?|versions?|errors?|changes?|mode|tonality|asteroids?|works?)",
    r"(?:ursa|canis|leo|asia|friars|culex) minor",
    r"teenage (?:mutant ninja turtles?|engineering)",
    r"kinder (?:surprise|bueno|eggs?|chocolate|joy|riegel)",
    r"enfant terrible|comme des garcons|las meninas|k[iı]z kulesi|anak krakatau",
    r"(?:el nino|la nina) (?:weather|phenomenon|events?|southern|storms?|effect|years?|season)",
    r"(?:ice|dragon|stone|bronze|iron|golden|space|atomic|new) age(?: \d+)?",
    r"(?:college|university|graduate|grad|phd|medical|law|art|adult) students?|student (?:unions?|loans?|cards?)",
)
# harmless outside a sexual context only
NAMES = (
    r"(?:baby|juvenile|newborn|adolescent|infant|young) (?:(?:sea|bald|polar|grizzly|brown|black|white|red|golden|"
    r"giant|snow|arctic|harp|fruit|blue|gr[ae]y|asian|african|emperor|mountain) )?(?:" + ANIMALS + r")",
    r"baby (?:animals?|yoda|groot|driver|ruth|jane)",
    r"million dollar baby|rosemary s baby|bush baby",
    r"kid (?:rock|cudi|icarus|creole|ink|laroi|loco|galahad|koala)|kids see ghosts|boys noize|boyz ii men",
    r"billy the kid|(?:karate|sundance|cincinnati|comeback) kid",
    r"soy boys?|(?:poster|love|flower) child(?:ren)?|boy ?bands?|girl (?:power|boss|groups?|bands?)",
    r"boy (?:george|meets world|shorts?)|(?:fall out|vault|danny) boy",
    r"(?:beach|beastie|backstreet|pet shop|oak ridge|jersey|everly|hardy|bad) boys",
    r"(?:spice|golden|gilmore|indigo|broke) girls",
    r"(?:gibson|bond|gossip|gone|tank) girls?",
    r"girl with (?:a|the) (?:pearl earring|balloon)",
    r"(?:union pacific )?big boy(?: locomotives?| steam\w*)?",
    r"little boy (?:atom(?:ic)? )?bombs?",
    r"(?:julia|lee|destiny s|desmond|lydia maria) child",
    r"(?:smells like )?teen spirit|teen (?:vogue|wolf)",
)

# --- pieces of which compounds and split words are put together -------------------------------------------------------

AROUND = """
little lil small young tiny school pre nude nudes naked porn porno sex sexy sexual xxx hot erotic hentai cute model
models
lover lovers pic pics nn asian step under age aged street sweet topless bride
"""
SMALL_WORDS = "a an the of in on with my and or to is by at her his photo picture drawing portrait"
COMPOUNDED = """
child children childs kid kids kidz kiddy kiddie girl girls girlz gurl gurls boy boys boyz teen teens teenage teenager
teenagers tween tweens baby babies babys toddler toddlers infant infants minor minors preteen preteens loli lolis shota
schoolgirl schoolgirls schoolboy schoolboys newborn adolescent juvenile underage
"""
# words that two or three neighbours may make together ("tod dler"); none that ordinary neighbours make ("min or")
SPLIT = """
child children girl girls boy boys kid kids teen teens teenager teenagers toddler toddlers baby babies infant infants
preteen preteens underage schoolgirl schoolgirls schoolboy loli lolis lolicon shota juvenile adolescent newborn minors
"""
# further words that are recognized with digits, signs or gaps in the place of letters
CORE = """
lolita lolitas pedo paedo pedophile paedophile csam lolicon shotacon kiddo kiddos under underage nude nudes naked
porn sex sexy nsfw
xxx topless undressed erotic young
little years year old student daughter lil
"""
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = (
    "zeroth first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth"
).split()
ROMAN = "- - ii iii iv - vi vii viii ix - xi xii xiii xiv xv xvi xvii".split()
GERMAN = (
    "null ein zwei drei vier funf sechs sieben acht neun zehn elf zwolf dreizehn vierzehn funfzehn sechzehn siebzehn"
).split()
RUSSIAN = (
    "двух трех четырех пяти шести семи восьми девяти десяти одиннадцати двенадцати тринадцати четырнадцати пятнадцати "
    "шестнадцати семнадцати"
).split()
UNITS = (
    r"wheels?|minutes?|seconds?|hours?|days?|miles?|dollars?|euros?|degrees?|met(?:er|re)s?|feet|inch(?:es)?|pounds?|"
    r"volts?|watts?|mm|cm|km|kg|lbs?|mph|holes?|stars?|layers?|percent|bars?|knots?|points?|pages?|items?"
)
YEARS = """
anos ano años ans jahre jahr anni jaar yas yasinda yasindaki tahun tuoi vuotias vuotta eves лет год года роки роков
років
साल वर्ष سنة سنوات عاما عام سال ετων χρονων שנים
"""
YEARS_INSIDE = "歳才岁歲살세"

# letters of other alphabets that look like a Latin letter but are not named after it
LOOKALIKES = {
    "а": "a", "в": "b", "с": "c", "ԁ": "d", "е": "e", "һ": "h", "і": "i", "ј": "j", "к": "k", "м": "m", "н": "h",
    "о": "o", "р": "p", "ԛ": "q", "ѕ": "s", "т": "t", "у": "y", "ѵ": "v", "ԝ": "w", "х": "x", "ү": "y", "ь": "b",
    "г": "r", "п": "n", "и": "u", "ӏ": "l", "ԍ": "g", "ɡ": "g", "ц": "u", "я": "r", "ѡ": "w", "л": "n", "ғ": "f",
    "α": "a", "β": "b", "γ": "y", "δ": "d", "ε": "e", "η": "n", "ι": "i", "κ": "k", "μ": "u", "ν": "v", "ο": "o",
    "ρ": "p", "σ": "o", "ς": "c", "τ": "t", "υ": "u", "χ": "x", "ω": "w", "ζ": "z", "λ": "l", "ϲ": "c", "ϳ": "j",
    "օ": "o", "ո": "n", "ս": "u", "հ": "h", "ց": "g", "ք": "p", "ր": "r", "ա": "w", "լ": "l", "ե": "t", "զ": "q",
    "ꭰ": "d", "ꭱ": "r", "ꭲ": "i", "ꭺ": "a", "ꮃ": "w", "ꮋ": "h", "ꮪ": "s", "ꮮ": "l", "ꮯ": "c", "ꮲ": "p", "ꮶ": "k",
    "ꮐ": "g", "ꭼ": "e", "ꮇ": "m", "ꭻ": "j", "ꮩ": "v", "ꮟ": "b", "ꮓ": "z",
    "ʙ": "b", "ɢ": "g", "ʜ": "h", "ɪ": "i", "ʟ": "l", "ɴ": "n", "ʀ": "r", "ʏ": "y", "ƅ": "b", "ı": "i", "ł": "l",
    "ø": "o", "đ": "d", "ß": "ss", "æ": "ae", "œ": "oe", "þ": "th", "ð": "d", "ʋ": "u", "ɩ": "i", "ɑ": "a", "ꜰ": "f",
    "×": "x", "∂": "d", "ℓ": "l", "∩": "n",
}  # fmt: skip
